// The accelerator pipeline without torch, on a device of plain memory, so that sanitizers see all of it.
#include "load/device_loader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "check.h"
#include "checkpoint.h"
#include "fake_device.h"
#include "file/fault_hook.h"

using namespace weightload;
using std::chrono::milliseconds;

namespace {

void evict(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY);
  ::fsync(fd);
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  ::close(fd);
}

struct Load {
  explicit Load(const std::vector<std::string>& paths, DeviceLoaderOptions options = small(), size_t slots = 4,
                std::vector<DeviceBlockRef> places = {})
      : Load(std::make_shared<FakeDevice>(), paths, options, slots, std::move(places)) {}
  Load(std::shared_ptr<FakeDevice> on, const std::vector<std::string>& paths, DeviceLoaderOptions options, size_t slots,
       std::vector<DeviceBlockRef> places = {})
      : device(std::move(on)), files(CheckpointFile::open_all(paths, 2)) {
    ring = PinnedRing::make(
        slots, [device = device, options](bool pinned) { return device->allocate_slot(options.slot_bytes, pinned); });
    loader =
        std::make_unique<DeviceLoader>(device, ring, files, everything(files), std::move(places), nullptr, options);
  }
  static DeviceLoaderOptions small() {
    DeviceLoaderOptions options;
    options.threads = 4;
    options.slot_bytes = 64 << 10;
    options.block_bytes = 300'000;
    return options;
  }
  DeviceLoader::Step next(DeviceTensor& tensor) {
    DeviceLoader::Step step;
    while ((step = loader->next(tensor, milliseconds(1000))) == DeviceLoader::Step::not_ready) {
    }
    return step;
  }
  size_t drain() {
    DeviceTensor tensor;
    size_t count = 0;
    while (next(tensor) == DeviceLoader::Step::tensor) {
      ++count;
      if (tensor.in_place) continue;
      const auto& bytes = static_cast<const FakeDevice::Block&>(*tensor.block).bytes;
      check(tensor, bytes.data() + tensor.block_offset);
      CHECK(tensor.block_offset % 256 == 0);
    }
    return count;
  }
  void check(const DeviceTensor& tensor, const char* bytes) {
    const uint64_t file = std::stoull(tensor.info->name);
    for (uint64_t i = 0; i < tensor.info->bytes.size(); ++i)
      CHECK(static_cast<unsigned char>(bytes[i]) == byte_at(file, tensor.info->bytes.begin + i));
  }

  std::shared_ptr<FakeDevice> device;
  CheckpointFiles files;
  std::shared_ptr<PinnedRing> ring;
  std::unique_ptr<DeviceLoader> loader;
};

}  // namespace

namespace {

uint64_t direct_bytes(const Load& load) {
  uint64_t total = 0;
  for (const FileCounts& file : load.loader->counts().files) total += file.direct_bytes;
  return total;
}

}  // namespace

TEST(every_byte_arrives_whatever_way_it_is_read) {
  const Checkpoint checkpoint;
  for (const ReadMode mode : {ReadMode::automatic, ReadMode::buffered, ReadMode::direct}) {
    for (const bool cold : {true, false}) {
      if (cold)
        for (const auto& path : checkpoint.paths()) evict(path);
      DeviceLoaderOptions options = Load::small();
      options.read = mode;
      Load load(checkpoint.paths(), options);
      CHECK(load.drain() == 309);
      uint64_t read = 0;
      for (const FileCounts& file : load.loader->counts().files) read += file.buffered_bytes + file.direct_bytes;
      CHECK(read == load.loader->total_bytes());
      CHECK(load.loader->counts().tensors == 309 && load.loader->counts().tensor_bytes == read);
      if (mode == ReadMode::buffered) CHECK(direct_bytes(load) == 0);
    }
  }
}

TEST(slots_that_begin_behind_a_page_are_read_into_directly_all_the_same) {
  const Checkpoint checkpoint;
  DeviceLoaderOptions options = Load::small();
  options.read = ReadMode::direct;
  Load aligned(checkpoint.paths(), options);
  CHECK(aligned.drain() == 309);
  for (const uint64_t slot_bytes : {8192u, 64u << 10}) {
    for (const size_t shift : {1u, 16u, 4095u}) {
      const auto device = std::make_shared<FakeDevice>();
      device->shift = shift;
      options.slot_bytes = slot_bytes;
      Load load(device, checkpoint.paths(), options, 3);
      CHECK(load.drain() == 309);
      CHECK(direct_bytes(load) == direct_bytes(aligned));
    }
  }
}

TEST(a_device_that_fails_while_all_slots_are_in_flight) {
  const Checkpoint checkpoint;
  for (const size_t slots : {1u, 4u}) {
    const auto device = std::make_shared<FakeDevice>();
    const auto go_on = device->hold();
    DeviceLoaderOptions options = Load::small();
    options.slot_bytes = 8192;
    Load load(device, checkpoint.paths(), options, slots);  // which hold less than a block
    while (load.ring->stats().wait_ns == 0) std::this_thread::yield();
    device->fails = true;
    DeviceTensor tensor;
    CHECK_THROWS(while (load.next(tensor) == DeviceLoader::Step::tensor){}, Error,
                 error.kind == ErrorKind::device_memory);
    go_on();
  }
}

TEST(a_ring_of_one_slot_and_odd_block_sizes) {
  const Checkpoint checkpoint;
  for (uint64_t block_bytes : {1u, 5000u, 70'000u, 100'000'000u}) {
    DeviceLoaderOptions options = Load::small();
    options.block_bytes = block_bytes;
    options.slot_bytes = 8192;
    CHECK(Load(checkpoint.paths(), options, 1).drain() == 309);
  }
}

TEST(pageable_slots_carry_the_same_bytes) {
  const Checkpoint checkpoint;
  auto files = checkpoint.paths();
  Load load({});
  load.device->pinned_left = 0;
  load.files = CheckpointFile::open_all(files, 1);
  load.ring =
      PinnedRing::make(3, [device = load.device](bool pinned) { return device->allocate_slot(64 << 10, pinned); });
  load.loader = std::make_unique<DeviceLoader>(load.device, load.ring, load.files, everything(load.files),
                                               std::vector<DeviceBlockRef>{}, nullptr, Load::small());
  CHECK(load.drain() == 309);
  CHECK(load.loader->stats().ring.pageable_slots > 0);
}

TEST(tensors_can_be_read_into_memory_that_is_there) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  std::vector<DeviceBlockRef> places;
  std::vector<const TensorInfo*> infos;
  for (const auto& file : files) {
    for (const TensorInfo& info : file->header().tensors) {
      const bool here = places.size() % 3 != 0;
      places.push_back(here ? std::make_shared<FakeDevice::Block>(info.bytes.size()) : nullptr);
      infos.push_back(&info);
    }
  }
  Load load(checkpoint.paths(), Load::small(), 2, places);
  CHECK(load.drain() == 309);
  for (size_t i = 0; i < places.size(); ++i) {
    if (!places[i]) continue;
    DeviceTensor tensor;
    tensor.info = infos[i];
    load.check(tensor, static_cast<const FakeDevice::Block&>(*places[i]).bytes.data());
  }
}

TEST(leaving_early_stops_and_gives_everything_back) {
  const Checkpoint checkpoint;
  for (int taken : {0, 1, 5, 200}) {
    auto device = std::make_shared<FakeDevice>();
    {
      Load load(checkpoint.paths());
      DeviceTensor tensor;
      for (int i = 0; i < taken; ++i) CHECK(load.next(tensor) == DeviceLoader::Step::tensor);
      load.loader->close();
      CHECK(load.device->slots_alive == 0);
      CHECK(load.next(tensor) == DeviceLoader::Step::end);
    }
  }
}

TEST(a_read_error_names_the_tensor_and_comes_before_it) {
  const Checkpoint checkpoint;
  for (uint64_t first = 0; first < 60; first += 5) {
    Load load(checkpoint.paths(), Load::small(), 2);
    fault_hook::arm({fault_hook::Fault::error, first, 1'000'000, EIO, milliseconds(0)});
    bool thrown = false;
    try {
      load.drain();
    } catch (const Error& error) {
      thrown = true;
      CHECK(error.kind == ErrorKind::read && error.context.error_number == EIO);
      CHECK(!error.context.tensor.empty() && error.context.offset);
    }
    const uint64_t calls = fault_hook::calls_since_armed();
    fault_hook::disarm();
    CHECK(thrown || calls <= first);
    load.loader->close();
    CHECK(load.device->slots_alive == 0);
  }
}

TEST(short_and_interrupted_reads_are_continued) {
  const Checkpoint checkpoint;
  for (const auto fault : {fault_hook::Fault::short_read, fault_hook::Fault::interrupt}) {
    for (const ReadMode mode : {ReadMode::buffered, ReadMode::direct}) {
      DeviceLoaderOptions options = Load::small();
      options.read = mode;
      fault_hook::arm({fault, 0, 100, 0, milliseconds(0)});
      CHECK(Load(checkpoint.paths(), options).drain() == 309);
      fault_hook::disarm();
    }
  }
}

TEST(a_file_system_that_refuses_direct_reads_is_read_through_the_page_cache) {
  const Checkpoint checkpoint;
  for (const auto& path : checkpoint.paths()) evict(path);
  Load load({checkpoint.paths()[0]}, [] {
    DeviceLoaderOptions options = Load::small();
    options.threads = 1;
    options.read = ReadMode::direct;
    return options;
  }());
  CHECK(load.drain() == 6);
  fault_hook::arm({fault_hook::Fault::error, 1, 1, EINVAL, milliseconds(0)});  // 0: the header
  Load refused({checkpoint.paths()[0]}, [] {
    DeviceLoaderOptions options = Load::small();
    options.threads = 1;
    options.read = ReadMode::direct;
    return options;
  }());
  CHECK(refused.drain() == 6);
  fault_hook::disarm();
  CHECK(direct_bytes(refused) == 0);
}

TEST(device_memory_that_runs_out_names_the_tensor) {
  const Checkpoint checkpoint;
  Load load({});
  for (int blocks : {0, 1, 3}) {
    load.device->blocks_left = blocks;
    load.files = CheckpointFile::open_all(checkpoint.paths(), 1);
    load.ring =
        PinnedRing::make(3, [device = load.device](bool pinned) { return device->allocate_slot(64 << 10, pinned); });
    load.loader = std::make_unique<DeviceLoader>(load.device, load.ring, load.files, everything(load.files),
                                                 std::vector<DeviceBlockRef>{}, nullptr, Load::small());
    CHECK_THROWS(load.drain(), Error, error.kind == ErrorKind::device_memory && !error.context.tensor.empty());
  }
}

namespace {

// Reads no further than the consumer has asked.
DeviceLoaderOptions on_demand() {
  DeviceLoaderOptions options = Load::small();
  options.window_bytes = 0;
  return options;
}

}  // namespace

TEST(the_next_block_is_allocated_before_reading_comes_to_it_unless_it_is_large) {
  for (const bool large : {false, true}) {
    const TemporaryFile file(0, {200'000, large ? 1'000'000u : 200'000u, 200'000});
    Load load({file.path}, on_demand());
    DeviceTensor tensor;
    CHECK(load.next(tensor) == DeviceLoader::Step::tensor);
    CHECK(load.device->blocks_made == (large ? 1 : 2));
    CHECK(load.drain() == 2);
    CHECK(load.device->blocks_made == 3);
  }
}

TEST(memory_that_is_not_there_before_it_is_needed_may_be_there_then) {
  const TemporaryFile file(0, {200'000, 200'000});
  const auto device = std::make_shared<FakeDevice>();
  device->blocks_left = 1;
  Load load(device, {file.path}, on_demand(), 4);
  DeviceTensor tensor;
  CHECK(load.next(tensor) == DeviceLoader::Step::tensor);
  CHECK(device->blocks_left < 0);  // it was asked for
  device->blocks_left = 1;
  CHECK(load.drain() == 1);
}

// It has none of the threads: whoever waits for them, or for what they wait on, waits for ever.
TEST(a_forked_child_is_told_and_lets_go) {
  const Checkpoint checkpoint;
  Load load(checkpoint.paths(), on_demand());
  DeviceTensor tensor;
  CHECK(load.next(tensor) == DeviceLoader::Step::tensor);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    CHECK_THROWS(load.next(tensor), Error, error.kind == ErrorKind::usage);
    const auto holders = tensor.block.use_count();
    load.loader.reset();
    ::_exit(tensor.block.use_count() == holders ? 0 : 1);  // nothing is freed without the driver
  }
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child && status == 0);
  CHECK(load.drain() == 308);
}

// Of which the kernel does not say what is there.
TEST(files_of_other_users_that_are_in_the_page_cache_are_read_through_it) {
  if (::geteuid() != 0) return;  // only root can become somebody else
  for (const bool cold : {true, false}) {
    const Checkpoint checkpoint;
    for (const auto& path : checkpoint.paths()) {
      CHECK(::chmod(path.c_str(), 0644) == 0);
      if (cold) evict(path);
    }
    CHECK(::seteuid(65534) == 0);
    Load load(checkpoint.paths());
    CHECK(load.drain() == 309);
    if (!cold) CHECK(direct_bytes(load) == 0);
    CHECK(::seteuid(0) == 0);
  }
}
