#include "device.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "arena.h"
#include "stream.h"

namespace simulated {
namespace {

thread_local int current = 0;
std::atomic<bool> contexts[kDevices];
std::atomic<bool> used{false};

int installed() {
  const char* const count = std::getenv("WEIGHTLOAD_SIMULATED_CUDA_DEVICES");
  const int wanted = count != nullptr ? std::atoi(count) : 2;
  return wanted < kDevices ? wanted : kDevices;
}

// As the driver reads it: up to the first that is none.
std::vector<int> read_visible() {
  std::vector<int> found;
  const char* const text = std::getenv("CUDA_VISIBLE_DEVICES");
  if (text == nullptr) {
    for (int d = 0; d < installed(); ++d) found.push_back(d);
    return found;
  }
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    char* end = nullptr;
    const long number = std::strtol(part.c_str(), &end, 10);
    if (end == part.c_str() || number < 0 || number >= installed()) break;
    found.push_back(static_cast<int>(number));
  }
  return found;
}

const std::vector<int>& visible() {
  static const auto* const devices = new std::vector<int>(read_visible());
  return *devices;
}

}  // namespace

int device_count() { return static_cast<int>(visible().size()); }
int physical_device(int device) { return visible().at(static_cast<size_t>(device)); }
int current_device() { return current; }

cudaError_t set_current_device(int device) {
  if (device_count() == 0) return cudaErrorNoDevice;
  if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
  current = device;
  return use_device(device);  // since CUDA 12 it makes the context
}

cudaError_t use_device(int device) {
  if (device_count() == 0) return cudaErrorNoDevice;
  if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
  if (forked() && used) return cudaErrorInitializationError;
  used = true;
  legacy_stream(device);
  contexts[device] = true;
  return cudaSuccess;
}

cudaError_t use_current_device() { return use_device(current); }
bool has_context(int device) { return device >= 0 && device < kDevices && contexts[device]; }

void fill_properties(int device, cudaDeviceProp* p) {
  std::memset(p, 0, sizeof *p);
  std::snprintf(p->name, sizeof p->name, "Simulated CUDA device %d", physical_device(device));
  std::memset(p->uuid.bytes, physical_device(device) + 1, sizeof p->uuid.bytes);
  p->totalGlobalMem = total_memory(device);
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 64 << 10;
  p->major = 9;
  p->minor = 0;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->multiProcessorCount = 4;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = 1;
  p->pciBusID = physical_device(device) + 1;
  p->asyncEngineCount = 3;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 50 << 20;
  p->maxThreadsPerMultiProcessor = 2048;
  p->streamPrioritiesSupported = p->cooperativeLaunch = 1;
  p->canUseHostPointerForRegisteredMem = p->hostRegisterSupported = p->memoryPoolsSupported = 1;
  p->maxBlocksPerMultiProcessor = 32;
  p->hostNumaId = -1;
}

cudaError_t attribute_of(int device, int attribute, int* value) {
  if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
  static const std::map<int, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMultiProcessorCount, 4},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
      {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrMemoryPoolsSupported, 1},
      {cudaDevAttrCanUseHostPointerForRegisteredMem, 1},
      {cudaDevAttrHostRegisterSupported, 1},
      {cudaDevAttrConcurrentManagedAccess, 0},
      {cudaDevAttrManagedMemory, 0},
      {cudaDevAttrPageableMemoryAccess, 0},
      {cudaDevAttrGPUDirectRDMASupported, 0},
      {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrClockRate, 1000000},
      {cudaDevAttrAsyncEngineCount, 3},
      {cudaDevAttrIpcEventSupport, 0},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrIntegrated, 0},
      {cudaDevAttrCanMapHostMemory, 1},
      {cudaDevAttrConcurrentKernels, 1},
      {cudaDevAttrComputeMode, 0},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrTextureAlignment, 512},
      {cudaDevAttrHostNumaId, -1},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrMemoryClockRate, 1000000},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrStreamPrioritiesSupported, 1},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
      {cudaDevAttrPciDomainId, 0},
      {cudaDevAttrPciDeviceId, 0},
      {cudaDevAttrDirectManagedMemAccessFromHost, 0},
      {cudaDevAttrMemoryPoolSupportedHandleTypes, 0},
  };
  if (attribute == cudaDevAttrPciBusId) {
    *value = physical_device(device) + 1;
    return cudaSuccess;
  }
  const auto found = known.find(attribute);
  // What a device has not is 0, as for most of the attributes.
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}

}  // namespace simulated
