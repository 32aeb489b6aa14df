// Collectives on tensors of the device, as NCCL's are, only later (README.md).
#include "process_group.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstring>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#include "backend.h"

namespace simulated {
namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr const char* kName = "simulated_ccl";

// The bytes of a tensor as the communicator's thread reaches them, and no hold on them: a tensor that is freed too
// early shows its poison.
struct Bytes {
  explicit Bytes(const at::Tensor& tensor) : size(tensor.nbytes()) {
    if (size > 0) data = shadow(tensor.data_ptr());
  }
  void read(char* to) const {
    if (size > 0) std::memcpy(to, data, size);
  }
  void write(const char* from) const {
    if (size > 0) std::memcpy(data, from, size);
  }

  size_t size;
  char* data = nullptr;
};

at::Tensor host_bytes(size_t size) { return at::empty({static_cast<int64_t>(size)}, at::kByte); }
char* begin_of(const at::Tensor& host) { return static_cast<char*>(host.data_ptr()); }

// What an operation is. Ranks whose operations differ would hang or exchange garbage; here they are told.
struct Kind {
  int64_t type, bytes, root;
};

// Moves bytes between the processes, by gloo. Only the communicator's thread sends. What is on its way is in memory of
// its own, so that an aborted operation of gloo's, which cannot be stopped, writes to nobody's.
class Wire {
 public:
  explicit Wire(c10::intrusive_ptr<c10d::Backend> gloo) : gloo_(std::move(gloo)) {}
  ~Wire() {
    if (abandoned_) static_cast<void>(gloo_.release());  // its destructor would wait for the peers
  }

  int rank() const { return gloo_->getRank(); }
  size_t ranks() const { return static_cast<size_t>(gloo_->getSize()); }

  void broadcast(at::Tensor& host, int64_t root, std::chrono::milliseconds timeout) {
    if (host.numel() == 0) return;
    std::vector<at::Tensor> tensors{host};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.timeout = timeout;
    finish(gloo_->broadcast(tensors, options));
  }

  at::Tensor all_gather(at::Tensor host, std::chrono::milliseconds timeout) {
    at::Tensor all = host_bytes(host.nbytes() * ranks());
    if (host.numel() == 0) return all;
    c10d::AllgatherOptions options;
    options.timeout = timeout;
    finish(gloo_->_allgather_base(all, host, options));
    return all;
  }

  void agree(const Kind& mine, std::chrono::milliseconds timeout) {
    at::Tensor host = host_bytes(sizeof(Kind));
    std::memcpy(begin_of(host), &mine, sizeof(Kind));
    const at::Tensor all = all_gather(host, timeout);
    for (size_t rank = 0; rank < ranks(); ++rank) {
      Kind other;
      std::memcpy(&other, begin_of(all) + rank * sizeof(Kind), sizeof(Kind));
      TORCH_CHECK(std::memcmp(&mine, &other, sizeof(Kind)) == 0, kName, ": collectives do not match: ", name(mine),
                  " on rank ", this->rank(), ", ", name(other), " on rank ", rank);
    }
  }

  void abort() {
    {
      std::lock_guard<std::mutex> lock(signal_->mutex);
      signal_->aborted = true;
    }
    signal_->changed.notify_all();
  }

  // What went wrong first, for all that come after it: the ranks are out of step then.
  void fail(std::exception_ptr error) {
    std::lock_guard<std::mutex> lock(signal_->mutex);
    if (!broken_) broken_ = std::move(error);
  }
  void require_whole() {
    std::lock_guard<std::mutex> lock(signal_->mutex);
    if (broken_) std::rethrow_exception(broken_);
    TORCH_CHECK(!signal_->aborted, kName, ": the communicator was aborted");
  }

 private:
  static std::string name(const Kind& kind) {
    std::ostringstream text;
    text << c10d::opTypeToString(static_cast<c10d::OpType>(kind.type)) << " of " << kind.bytes << " bytes";
    if (kind.root >= 0) text << " from " << kind.root;
    return text.str();
  }

  void finish(const c10::intrusive_ptr<c10d::Work>& work) {
    const auto future = work->getFuture();
    auto done = std::make_shared<bool>(false);
    // It holds no Wire: gloo's thread may be the last to let go of it, and would then join itself.
    future->addCallback([signal = signal_, done](c10::ivalue::Future&) {
      {
        std::lock_guard<std::mutex> lock(signal->mutex);
        *done = true;
      }
      signal->changed.notify_all();
    });
    std::unique_lock<std::mutex> lock(signal_->mutex);
    signal_->changed.wait(lock, [&] { return *done || signal_->aborted; });
    if (!*done) abandoned_ = true;
    TORCH_CHECK(*done, kName, ": the communicator was aborted");
    if (future->hasError()) std::rethrow_exception(future->exception_ptr());
  }

  struct Signal {
    std::mutex mutex;
    std::condition_variable changed;
    bool aborted = false;
  };

  c10::intrusive_ptr<c10d::Backend> gloo_;
  const std::shared_ptr<Signal> signal_ = std::make_shared<Signal>();
  std::exception_ptr broken_;
  bool abandoned_ = false;
};

// How an operation ended; written by the communicator's thread before the operation's moment is reached.
class Ending {
 public:
  void fail(std::exception_ptr error) {
    std::lock_guard<std::mutex> lock(mutex_);
    error_ = std::move(error);
  }
  std::exception_ptr error() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return error_;
  }

 private:
  mutable std::mutex mutex_;
  std::exception_ptr error_;
};

struct Issued {
  c10::Stream stream;  // the communicator's
  std::shared_ptr<Ending> ending;
  MomentRef done;
};

// Keeps the tensors until somebody's stream waits for it, or until it is gone.
class Work final : public c10d::Work {
 public:
  Work(int rank, c10d::OpType type, Issued issued, std::vector<at::Tensor> inputs, std::vector<at::Tensor> outputs)
      : c10d::Work(rank, type), issued_(std::move(issued)), inputs_(std::move(inputs)), outputs_(std::move(outputs)) {}

  bool isCompleted() override { return issued_.done->reached(); }
  bool isSuccess() const override { return issued_.done->reached() && !issued_.ending->error(); }
  std::exception_ptr exception() const override { return issued_.ending->error(); }

  // The calling thread's stream waits; the host does not, except for a barrier or when it says how long.
  bool wait(std::chrono::milliseconds timeout) override {
    synchronize();
    if (retrieveOpType() == c10d::OpType::BARRIER || timeout != kNoTimeout) {
      issued_.done->wait();
      throw_if_failed();
    }
    return true;
  }

  void synchronize() override {
    const int device = issued_.stream.device_index();
    stream(device, current_stream(device)).wait_for(issued_.done);
    inputs_.clear();
    outputs_.clear();
    throw_if_failed();
  }
  void blockCurrentStream() override { synchronize(); }

  // Complete at once: who waits for it makes its stream wait. Without tensors when it is asked for after wait().
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()),
                                                           std::vector<c10::Device>{issued_.stream.device()});
    const c10::StreamGuard on_stream(issued_.stream);
    future->markCompleted(at::IValue(outputs_));
    return future;
  }
  std::vector<at::Tensor> result() override { return outputs_; }

 private:
  void throw_if_failed() const {
    if (const auto error = issued_.ending->error()) std::rethrow_exception(error);
  }

  const Issued issued_;
  std::vector<at::Tensor> inputs_, outputs_;
};

class Group;
std::mutex groups_mutex;
std::set<Group*> groups;

class Group final : public c10d::Backend {
 public:
  Group(c10::intrusive_ptr<c10d::Backend> gloo, std::chrono::milliseconds timeout)
      : Backend(gloo->getRank(), gloo->getSize()),
        options_(c10::make_intrusive<Options>(kName, timeout)),
        wire_(std::make_shared<Wire>(std::move(gloo))) {
    std::lock_guard<std::mutex> lock(groups_mutex);
    groups.insert(this);
  }
  // What was issued runs first: it ends at the group's timeout, when a rank has left.
  ~Group() override {
    {
      std::lock_guard<std::mutex> lock(groups_mutex);
      groups.erase(this);
    }
    close();
  }

  const std::string getBackendName() const override { return kName; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  void setTimeout(std::chrono::milliseconds timeout) override { options_->timeout = timeout; }
  void shutdown() override { close(); }
  void abort() override { wire_->abort(); }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override {
    TORCH_CHECK(tensors.size() == 1, kName, ": one tensor at a time");
    const Bytes bytes(checked(tensors[0]));
    const int64_t root = options.rootRank;
    const auto patience = timeout(options.timeout);
    const auto run = [bytes, root, patience](Wire& wire) {
      wire.agree({kind(c10d::OpType::BROADCAST), static_cast<int64_t>(bytes.size), root}, patience);
      at::Tensor host = host_bytes(bytes.size);
      if (wire.rank() == root) bytes.read(begin_of(host));
      wire.broadcast(host, root, patience);
      if (wire.rank() != root) bytes.write(begin_of(host));
    };
    return issue(c10d::OpType::BROADCAST, tensors[0].device().index(), options.asyncOp, tensors, tensors, run);
  }

  // The input may be the rank's own part of the output.
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& options) override {
    TORCH_CHECK(output.scalar_type() == input.scalar_type() && output.numel() == input.numel() * getSize(), kName,
                ": the output must have as many elements as the inputs of all ranks");
    const Bytes from(checked(input)), to(checked(output));
    const auto patience = timeout(options.timeout);
    const auto run = [from, to, patience](Wire& wire) {
      to.write(begin_of(gather(wire, c10d::OpType::_ALLGATHER_BASE, from, patience)));
    };
    return issue(c10d::OpType::_ALLGATHER_BASE, output.device().index(), options.asyncOp, {input}, {output}, run);
  }

  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override {
    TORCH_CHECK(inputs.size() == 1 && outputs.size() == 1, kName, ": one tensor at a time");
    TORCH_CHECK(outputs[0].size() == static_cast<size_t>(getSize()), kName, ": one output for each rank");
    const Bytes from(checked(inputs[0]));
    std::vector<Bytes> to;
    for (const at::Tensor& output : outputs[0]) {
      to.emplace_back(checked(output));
      TORCH_CHECK(to.back().size == from.size, kName, ": outputs must be as large as the inputs");
    }
    const auto patience = timeout(options.timeout);
    const auto run = [from, to, patience](Wire& wire) {
      const at::Tensor all = gather(wire, c10d::OpType::ALLGATHER, from, patience);
      for (size_t rank = 0; rank < to.size(); ++rank) to[rank].write(begin_of(all) + rank * from.size);
    };
    return issue(c10d::OpType::ALLGATHER, inputs[0].device().index(), options.asyncOp, inputs, outputs[0], run);
  }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    using Op = c10d::ReduceOp;
    TORCH_CHECK(tensors.size() == 1, kName, ": one tensor at a time");
    const Op::RedOpType op = options.reduceOp;
    TORCH_CHECK(op == Op::SUM || op == Op::MIN || op == Op::MAX, kName, ": sum, minimum and maximum only");
    const Bytes bytes(checked(tensors[0]));
    const at::ScalarType dtype = tensors[0].scalar_type();
    const auto patience = timeout(options.timeout);
    const auto run = [bytes, op, dtype, patience](Wire& wire) {
      const at::Tensor all = gather(wire, c10d::OpType::ALLREDUCE, bytes, patience)
                                 .view({static_cast<int64_t>(wire.ranks()), static_cast<int64_t>(bytes.size)})
                                 .view(dtype);
      const at::Tensor reduced = op == Op::SUM   ? at::sum(all, 0, false, dtype)
                                 : op == Op::MIN ? at::amin(all, 0)
                                                 : at::amax(all, 0);
      bytes.write(begin_of(reduced.contiguous()));
    };
    return issue(c10d::OpType::ALLREDUCE, tensors[0].device().index(), options.asyncOp, tensors, tensors, run);
  }

  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override {
    int device = current_device();
    if (!options.device_ids.empty()) device = static_cast<int>(options.device_ids[0]);
    if (options.device) device = options.device->index();
    const auto patience = timeout(options.timeout);
    const auto run = [patience](Wire& wire) { wire.agree({kind(c10d::OpType::BARRIER), 0, -1}, patience); };
    return issue(c10d::OpType::BARRIER, device, options.asyncOp, {}, {}, run);
  }

 private:
  static int64_t kind(c10d::OpType type) { return static_cast<int64_t>(type); }

  static at::Tensor gather(Wire& wire, c10d::OpType type, const Bytes& mine, std::chrono::milliseconds timeout) {
    wire.agree({kind(type), static_cast<int64_t>(mine.size), -1}, timeout);
    at::Tensor host = host_bytes(mine.size);
    mine.read(begin_of(host));
    return wire.all_gather(host, timeout);
  }

  static const at::Tensor& checked(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == kType, kName, ": tensors of the simulated accelerator only, not of ",
                tensor.device());
    TORCH_CHECK(tensor.is_contiguous(), kName, ": tensors must be contiguous");
    return tensor;
  }

  std::chrono::milliseconds timeout(std::chrono::milliseconds wanted) const {
    return wanted == c10d::kUnsetTimeout ? options_->timeout : wanted;
  }

  template <class Run>
  c10::intrusive_ptr<c10d::Work> issue(c10d::OpType type, int device, bool async, std::vector<at::Tensor> inputs,
                                       std::vector<at::Tensor> outputs, const Run& run) {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!closed_, kName, ": the group was destroyed");
    if (stream_ < 0) {
      device_ = device;
      stream_ = open_stream(device);
    }
    TORCH_CHECK(device == device_, kName, ": a rank has one device; this one has used ", device_, ", now ", device);
    Stream& mine = stream(device, stream_);
    Stream& current = stream(device, current_stream(device));
    mine.wait_for(current.mark());
    auto ending = std::make_shared<Ending>();
    mine.enqueue([wire = wire_, ending, run] {
      try {
        wire->require_whole();
        run(*wire);
      } catch (...) {
        wire->fail(std::current_exception());
        ending->fail(std::current_exception());
      }
    });
    const MomentRef done = mine.mark();
    // As NCCL's, an operation that is not asynchronous belongs to the caller's stream, which keeps its tensors alive.
    if (!async) {
      current.wait_for(done);
      inputs.clear();
    }
    const c10::Device place(kType, static_cast<c10::DeviceIndex>(device));
    Issued issued{c10::Stream(c10::Stream::UNSAFE, place, stream_), ending, done};
    return c10::make_intrusive<Work>(getRank(), type, std::move(issued), std::move(inputs), std::move(outputs));
  }

  void close() {
    int64_t used;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      used = std::exchange(stream_, -1);
    }
    if (used >= 0) close_stream(device_, used);
  }

  const c10::intrusive_ptr<Options> options_;
  const std::shared_ptr<Wire> wire_;
  std::mutex mutex_;  // guards what follows, and keeps each operation behind what it waits for
  int device_ = -1;
  int64_t stream_ = -1;
  bool closed_ = false;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> make_group(const c10::intrusive_ptr<c10d::Backend>& gloo, int64_t timeout_ms) {
  return c10::make_intrusive<Group>(gloo, std::chrono::milliseconds(timeout_ms));
}

void abort_groups() {
  std::lock_guard<std::mutex> lock(groups_mutex);
  for (Group* group : groups) group->abort();
}

}  // namespace simulated
