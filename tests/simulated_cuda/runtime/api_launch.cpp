// Kernels: what torch registers, and the few that run here by name.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "capture.h"
#include "device.h"
#include "errors.h"
#include "report.h"
#include "stream.h"

namespace simulated {
namespace {

// Registered while libraries are loaded, before anything else here is set up.
std::map<const void*, std::string>& kernels() {
  static auto* const one = new std::map<const void*, std::string>;
  return *one;
}

struct Call {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Call> calls;

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                    &std::free);
  return status == 0 ? text.get() : name;
}

// The size of FillFunctor<T>'s T.
size_t fill_size(const std::string& type) {
  static const std::map<std::string, size_t> sizes = {{"unsigned char", 1},
                                                      {"signed char", 1},
                                                      {"bool", 1},
                                                      {"short", 2},
                                                      {"int", 4},
                                                      {"long", 8},
                                                      {"float", 4},
                                                      {"double", 8},
                                                      {"c10::Half", 2},
                                                      {"c10::BFloat16", 2},
                                                      {"c10::complex<float>", 8},
                                                      {"c10::complex<double>", 16},
                                                      {"unsigned short", 2},
                                                      {"unsigned int", 4},
                                                      {"unsigned long", 8},
                                                      {"c10::complex<c10::Half>", 4}};
  if (const auto found = sizes.find(type); found != sizes.end()) return found->second;
  return type.rfind("c10::Float8", 0) == 0 ? 1 : 0;
}

bool fill(const std::string& name, void** arguments, const StreamRef& stream) {
  const std::string opening = "FillFunctor<";
  const size_t at = name.find(opening);
  if (at == std::string::npos) return false;
  size_t end = at + opening.size();
  for (int depth = 1; depth > 0 && end < name.size(); ++end) depth += name[end] == '<' ? 1 : name[end] == '>' ? -1 : 0;
  const size_t size = fill_size(name.substr(at + opening.size(), end - 1 - at - opening.size()));
  if (size == 0) return false;
  // (int N, FillFunctor<T> f, array<char*, 1> data, ...)
  const auto count = static_cast<size_t>(*static_cast<int*>(arguments[0]));
  const char* const value = static_cast<const char*>(arguments[1]);
  const auto bytes = std::make_shared<std::vector<char>>(value, value + size);
  char* const to = *static_cast<char**>(arguments[2]);
  if (device_of(to) < 0 || !allocation_of(to, count * size)) return false;
  enqueue(stream, "fill", {{reinterpret_cast<uintptr_t>(to), count * size, true}}, [=] {
    for (size_t i = 0; i < count; ++i) std::memcpy(reach(to) + i * size, bytes->data(), size);
  });
  return true;
}

bool spin(const std::string& name, void** arguments, const StreamRef& stream) {
  if (name.find("spin_kernel") == std::string::npos) return false;
  const auto cycles = *static_cast<int64_t*>(arguments[0]);
  enqueue(stream, "spin", {}, [=] { std::this_thread::sleep_for(std::chrono::nanoseconds(cycles)); });
  return true;
}

cudaError_t launch(const void* function, void** arguments, cudaStream_t handle) {
  USE_DEVICE();
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  const auto found = kernels().find(function);
  if (found == kernels().end()) return finish(cudaErrorInvalidDeviceFunction);
  if (is_capturing(*stream)) return cudaSuccess;
  const std::string name = demangled(found->second);
  if (fill(name, arguments, stream) || spin(name, arguments, stream)) return cudaSuccess;
  return unprovided(("the kernel " + name).c_str());
}

}  // namespace
}  // namespace simulated

using namespace simulated;

extern "C" {

void** __cudaRegisterFatBinary(void* binary) { return new void*(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  calls.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (calls.empty()) return cudaErrorInvalidValue;
  *grid = calls.back().grid;
  *block = calls.back().block;
  *shared = calls.back().shared;
  *static_cast<cudaStream_t*>(stream) = calls.back().stream;
  calls.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void** arguments, size_t, cudaStream_t stream) {
  return launch(kernel, arguments, stream);
}

cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void** arguments, size_t, cudaStream_t stream) {
  return launch(function, arguments, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, arguments, config->stream);
}

cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* symbol) {
  *function = reinterpret_cast<cudaFunction_t>(const_cast<void*>(symbol));
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
}
