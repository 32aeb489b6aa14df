// libcuda.so.1: what torch and the loaders ask of the driver. Contexts are the runtime's; memory that is mapped by hand
// (expandable segments) is a memory file each.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>

#include "../runtime/control.h"

namespace {

constexpr size_t kGranule = size_t{2} << 20;

struct Handle {
  int file;
  int device;
  size_t bytes;
  int references;  // the program's own, and one a mapping
};

std::mutex mutex;
std::map<CUmemGenericAllocationHandle, Handle>& handles() {
  static auto* const one = new std::map<CUmemGenericAllocationHandle, Handle>;
  return *one;
}
std::map<CUdeviceptr, CUmemGenericAllocationHandle>& mappings() {
  static auto* const one = new std::map<CUdeviceptr, CUmemGenericAllocationHandle>;
  return *one;
}
CUmemGenericAllocationHandle made_ever = 0;

// With the tables locked.
void let_go(CUmemGenericAllocationHandle number) {
  const auto found = handles().find(number);
  if (--found->second.references > 0) return;
  ::close(found->second.file);
  simulated_cuda_give(found->second.device, found->second.bytes);
  handles().erase(found);
}

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device) + 1); }
int device_of(CUcontext context) { return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1; }

CUresult from_runtime(cudaError_t error) { return static_cast<CUresult>(error); }

int current() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

bool is_device(CUdevice device) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && device >= 0 && device < count;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) {
  int count = 0;
  return from_runtime(cudaGetDeviceCount(&count));
}

CUresult cuDriverGetVersion(int* version) { return from_runtime(cudaDriverGetVersion(version)); }
CUresult cuDeviceGetCount(int* count) { return from_runtime(cudaGetDeviceCount(count)); }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return is_device(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) {
    *value = 1;
    return CUDA_SUCCESS;
  }
  if (attribute == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED ||
      attribute == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED) {
    *value = 0;
    return CUDA_SUCCESS;
  }
  return from_runtime(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device));
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) std::memcpy(uuid->bytes, properties.uuid.bytes, sizeof uuid->bytes);
  return from_runtime(error);
}

CUresult cuDeviceGetName(char* name, int room, CUdevice device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) std::strncpy(name, properties.name, static_cast<size_t>(room));
  return from_runtime(error);
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *active = simulated_cuda_has_context(device);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  const int before = current();
  const cudaError_t error = cudaSetDevice(device);
  *context = context_of(device);
  if (error == cudaSuccess && simulated_cuda_has_context(before)) cudaSetDevice(before);
  return from_runtime(error);
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = simulated_cuda_has_context(current()) ? context_of(current()) : nullptr;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  return context == nullptr ? CUDA_SUCCESS : from_runtime(cudaSetDevice(device_of(context)));
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current();
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() { return from_runtime(cudaDeviceSynchronize()); }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = cudaGetErrorName(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  *granularity = kGranule;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* pointer, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  if (bytes == 0 || bytes % kGranule != 0) return CUDA_ERROR_INVALID_VALUE;
  *pointer = reinterpret_cast<CUdeviceptr>(simulated_cuda_reserve_addresses(current(), bytes));
  return *pointer != 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t bytes) {
  simulated_cuda_release_addresses(reinterpret_cast<void*>(pointer), bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* properties,
                     unsigned long long) {
  if (bytes == 0 || bytes % kGranule != 0 || properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int device = properties->location.id;
  if (!simulated_cuda_take(device, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  const int file = ::memfd_create("simulated device memory", MFD_CLOEXEC);
  if (file < 0 || ::ftruncate(file, static_cast<off_t>(bytes)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
  std::lock_guard<std::mutex> lock(mutex);
  *handle = ++made_ever;
  handles()[*handle] = {file, device, bytes, 1};
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  std::lock_guard<std::mutex> lock(mutex);
  if (handles().count(handle) == 0) return CUDA_ERROR_INVALID_VALUE;
  let_go(handle);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr pointer, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = handles().find(handle);
  if (found == handles().end() || offset != 0 || bytes != found->second.bytes) return CUDA_ERROR_INVALID_VALUE;
  if (!simulated_cuda_map(reinterpret_cast<void*>(pointer), bytes, found->second.file)) return CUDA_ERROR_INVALID_VALUE;
  ++found->second.references;
  mappings()[pointer] = handle;
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr pointer, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto it = mappings().lower_bound(pointer); it != mappings().end() && it->first < pointer + bytes;) {
    simulated_cuda_unmap(reinterpret_cast<void*>(it->first), handles().at(it->second).bytes);
    let_go(it->second);
    it = mappings().erase(it);
  }
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  cudaPointerAttributes found;
  const cudaError_t error = cudaPointerGetAttributes(&found, reinterpret_cast<void*>(pointer));
  if (error != cudaSuccess) return from_runtime(error);
  if (found.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(value) = found.device; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(value) = context_of(found.device); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(value) = found.type == cudaMemoryTypeDevice ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: return CUDA_SUCCESS;
    default: simulated_cuda_unprovided("cuPointerGetAttribute of another attribute"); return CUDA_ERROR_NOT_SUPPORTED;
  }
}

CUresult cuPointerSetAttribute(const void*, CUpointer_attribute, CUdeviceptr) { return CUDA_SUCCESS; }

CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle*) { return CUDA_SUCCESS; }
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }

CUresult cuGetProcAddress(const char* symbol, void** function, int, cuuint64_t,
                          CUdriverProcAddressQueryResult* result) {
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion(symbol, function, 13000, 0, &found);
  if (result != nullptr) {
    *result = *function != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *function != nullptr ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
}
