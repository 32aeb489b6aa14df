// Devices, versions, peers.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "arena.h"
#include "device.h"
#include "errors.h"
#include "report.h"
#include "stream.h"

using namespace simulated;

namespace {

bool is_device(int device) { return device >= 0 && device < device_count(); }

// The driver lies beside this library.
void* driver() {
  static void* const opened = [] {
    Dl_info here;
    ::dladdr(reinterpret_cast<void*>(&driver), &here);
    const std::string path = here.dli_fname;
    return ::dlopen((path.substr(0, path.rfind('/') + 1) + "libcuda.so.1").c_str(), RTLD_NOW | RTLD_GLOBAL);
  }();
  return opened;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return finish(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return finish(set_current_device(device)); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return finish(cudaErrorInvalidDevice);
  fill_properties(device, properties);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return finish(attribute_of(device, attribute, value));
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  if (!is_device(device)) return finish(cudaErrorInvalidDevice);
  std::snprintf(text, static_cast<size_t>(size), "0000:%02x:00.0", physical_device(device) + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* text) {
  for (int d = 0; d < device_count(); ++d) {
    char other[32];
    cudaDeviceGetPCIBusId(other, sizeof other, d);
    if (std::strcmp(other, text) == 0) {
      *device = d;
      return cudaSuccess;
    }
  }
  return finish(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  USE_DEVICE();
  NOT_IN_CAPTURE();
  synchronize_device(current_device());
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  if (!is_device(device) || !is_device(peer)) return finish(cudaErrorInvalidDevice);
  *can = device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  static auto* const enabled = new std::set<std::pair<int, int>>;
  static std::mutex mutex;
  USE_DEVICE();
  if (!is_device(peer) || peer == current_device()) return finish(cudaErrorInvalidDevice);
  std::lock_guard<std::mutex> lock(mutex);
  return finish(enabled->emplace(current_device(), peer).second ? cudaSuccess : cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaDeviceDisablePeerAccess(int) { return cudaSuccess; }
cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  USE_DEVICE();
  const int device = current_device();
  *total = total_memory(device);
  const size_t used = used_memory(device);
  *free = *total > used ? *total - used : 0;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  // The newest form of a call has a number in its name.
  *function = driver() != nullptr ? ::dlsym(driver(), (std::string(symbol) + "_v2").c_str()) : nullptr;
  if (*function == nullptr && driver() != nullptr) *function = ::dlsym(driver(), symbol);
  if (result != nullptr) {
    *result = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  if (*function == nullptr) say_unprovided(symbol);
  return finish(*function != nullptr || result != nullptr ? cudaSuccess : cudaErrorNotSupported);
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(symbol, function, 13000, flags, result);
}
}
