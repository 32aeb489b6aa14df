#pragma once
#include <driver_types.h>

#include <cstddef>
#include <cstdint>

// What the simulation exports beside CUDA's own calls. Plain C: Python calls it by ctypes.
extern "C" {

struct simulated_cuda_access {
  const void* begin;
  size_t bytes;
  int writes;
};
struct simulated_cuda_clock;

// The knobs for tests.
void simulated_cuda_seed(uint64_t seed, uint64_t longest_us);
int simulated_cuda_hold(int device, cudaStream_t stream);  // a gate's number, or -1: no such stream
void simulated_cuda_release(int gate);
size_t simulated_cuda_streams(int device, cudaStream_t* handles, size_t room);  // all but the default one; how many
int simulated_cuda_has_context(int device);
size_t simulated_cuda_used(int device);
size_t simulated_cuda_peak(int device);
void simulated_cuda_reset_peak(int device);
void simulated_cuda_limit(int device, size_t bytes);
size_t simulated_cuda_locked();
size_t simulated_cuda_locked_made();
void simulated_cuda_fail_locked_after(long count);  // -1: never
size_t simulated_cuda_reports();
void simulated_cuda_report(const char* line);
int simulated_cuda_in_forked_child();

// An operation of a stream: `run(data)` with what it reads and writes. `behind`, if any, is a chain of operations that
// run one after the other on whatever streams; the caller sees to that they do.
int simulated_cuda_enqueue(cudaStream_t stream, const char* what, const simulated_cuda_access* accesses, size_t count,
                           void (*run)(void*), void* data, simulated_cuda_clock* behind);
simulated_cuda_clock* simulated_cuda_new_clock();
void simulated_cuda_delete_clock(simulated_cuda_clock* clock);
void* simulated_cuda_reach(const void* pointer);  // where the host may touch it, on a stream's thread
int simulated_cuda_poison(void* pointer, size_t bytes, int value, cudaStream_t stream, const char* what);

// The driver's memory.
void* simulated_cuda_reserve_addresses(int device, size_t bytes);
void simulated_cuda_release_addresses(void* pointer, size_t bytes);
int simulated_cuda_take(int device, size_t bytes);
void simulated_cuda_give(int device, size_t bytes);
int simulated_cuda_map(void* pointer, size_t bytes, int descriptor);
void simulated_cuda_unmap(void* pointer, size_t bytes);

// What the stubs call.
int simulated_cuda_unprovided(const char* name);
}
