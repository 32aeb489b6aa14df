// What tests, the operators and the simulated NCCL ask of the simulation itself.
#include "control.h"

#include <map>

#include "arena.h"
#include "copy.h"
#include "device.h"
#include "errors.h"
#include "host_memory.h"
#include "report.h"
#include "stream.h"

using namespace simulated;

namespace {

std::mutex mutex;
std::map<int, std::function<void()>>& gates() {
  static auto* const one = new std::map<int, std::function<void()>>;
  return *one;
}
int gates_ever = 0;

std::vector<Access> accesses_of(const simulated_cuda_access* given, size_t count) {
  std::vector<Access> accesses;
  for (size_t i = 0; i < count; ++i) {
    accesses.push_back({reinterpret_cast<uintptr_t>(given[i].begin), given[i].bytes, given[i].writes != 0});
  }
  return accesses;
}

}  // namespace

extern "C" {

void simulated_cuda_seed(uint64_t seed, uint64_t longest_us) { seed_delays(seed, longest_us); }

int simulated_cuda_hold(int device, cudaStream_t handle) {
  const StreamRef stream = handle == nullptr ? legacy_stream(device) : find_stream(handle);
  if (!stream) return -1;
  auto gate = hold(stream);
  std::lock_guard<std::mutex> lock(mutex);
  gates()[++gates_ever] = std::move(gate);
  return gates_ever;
}

void simulated_cuda_release(int number) {
  std::function<void()> gate;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = gates().find(number);
    if (found == gates().end()) return;
    gate = std::move(found->second);
    gates().erase(found);
  }
  gate();
}

size_t simulated_cuda_streams(int device, cudaStream_t* handles, size_t room) {
  const StreamRef legacy = legacy_stream(device);
  size_t count = 0;
  for (const StreamRef& stream : streams_of(device)) {
    if (stream == legacy) continue;
    if (count < room) handles[count] = reinterpret_cast<cudaStream_t>(stream.get());
    ++count;
  }
  return count;
}

int simulated_cuda_has_context(int device) { return has_context(device); }
size_t simulated_cuda_used(int device) { return used_memory(device); }
size_t simulated_cuda_peak(int device) { return peak_memory(device); }
void simulated_cuda_reset_peak(int device) { reset_peak(device); }
void simulated_cuda_limit(int device, size_t bytes) { limit_memory(device, bytes); }
size_t simulated_cuda_locked() { return locked_bytes(); }
size_t simulated_cuda_locked_made() { return locked_made(); }
void simulated_cuda_fail_locked_after(long count) { fail_locked_after(count); }
size_t simulated_cuda_reports() { return reports(); }
void simulated_cuda_report(const char* line) { add_report(line); }
int simulated_cuda_in_forked_child() { return forked(); }

void* simulated_cuda_reach(const void* pointer) { return reach(pointer); }

int simulated_cuda_poison(void* pointer, size_t bytes, int value, cudaStream_t handle, const char* what) {
  // The stream's device is not always the thread's current one, which the default stream's handle goes by.
  const int device = device_of(pointer);
  const StreamRef stream = handle == nullptr && device >= 0 ? legacy_stream(device) : find_stream(handle);
  return stream ? set(pointer, value, bytes, stream, what) : cudaErrorInvalidResourceHandle;
}

int simulated_cuda_enqueue(cudaStream_t handle, const char* what, const simulated_cuda_access* accesses, size_t count,
                           void (*run)(void*), void* data, simulated_cuda_clock* behind) {
  const StreamRef stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  auto* const clock = reinterpret_cast<Clock*>(behind);
  enqueue(stream, what, accesses_of(accesses, count), [run, data] { run(data); }, clock, clock);
  return cudaSuccess;
}

simulated_cuda_clock* simulated_cuda_new_clock() { return reinterpret_cast<simulated_cuda_clock*>(new Clock); }
void simulated_cuda_delete_clock(simulated_cuda_clock* clock) { delete reinterpret_cast<Clock*>(clock); }

void* simulated_cuda_reserve_addresses(int device, size_t bytes) { return reserve_addresses(device, bytes); }
void simulated_cuda_release_addresses(void* pointer, size_t bytes) { release_addresses(pointer, bytes); }
int simulated_cuda_take(int device, size_t bytes) { return take_memory(device, bytes); }
void simulated_cuda_give(int device, size_t bytes) { give_memory(device, bytes); }

int simulated_cuda_map(void* pointer, size_t bytes, int descriptor) {
  if (!commit(pointer, bytes, descriptor)) return 0;
  note_allocation(pointer, bytes);
  return 1;
}

void simulated_cuda_unmap(void* pointer, size_t bytes) {
  std::string by;
  {
    std::lock_guard<std::mutex> lock(order_lock());
    by = checker().unsettled(reinterpret_cast<uintptr_t>(pointer), bytes, host_clock());
  }
  if (!by.empty()) add_report("cuMemUnmap: memory is taken away while it may be used by " + by);
  synchronize_device(device_of(pointer));
  {
    std::lock_guard<std::mutex> lock(order_lock());
    checker().forget(reinterpret_cast<uintptr_t>(pointer), bytes);
  }
  drop_allocation(pointer);
  decommit(pointer, bytes, false);
}
}
