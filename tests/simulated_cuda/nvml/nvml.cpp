// libnvidia-ml.so.1: what torch asks of it. There is no link between devices and no fabric; a device is found by its
// address on the bus, and runs no process that one would want to hear of.
//
// NVML's header is in no package of torch's: the few calls are declared here, as NVML's documentation has them.
extern "C" {

constexpr int kSuccess = 0, kNotSupported = 3;

int nvmlInit_v2() { return kSuccess; }
int nvmlShutdown() { return kSuccess; }

int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) {
  static int any;
  *device = &any;
  return kSuccess;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) { return kNotSupported; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return kNotSupported; }
int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return kSuccess; }  // what it was given: no fabric

int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) {
  *count = 0;
  return kSuccess;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, void* found) {
  return nvmlDeviceGetComputeRunningProcesses(device, count, found);
}

int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return kSuccess;
}
}
