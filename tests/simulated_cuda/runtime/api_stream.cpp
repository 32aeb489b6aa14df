// Streams, events and host functions.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "capture.h"
#include "device.h"
#include "errors.h"
#include "stream.h"

namespace simulated {
namespace {

struct Event {
  int device;
  unsigned flags;
  MomentRef moment;                // the last recording's
  unsigned long long capture = 0;  // or the capture that it is part of
};

std::mutex mutex;
std::map<cudaEvent_t, Event>& events() {
  static auto* const one = new std::map<cudaEvent_t, Event>;
  return *one;
}

bool find_event(cudaEvent_t handle, Event* event) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = events().find(handle);
  if (found == events().end()) return false;
  *event = found->second;
  return true;
}

cudaError_t make_stream(cudaStream_t* stream, unsigned flags, int priority) {
  USE_DEVICE();
  *stream = open_stream(current_device(), flags, priority);
  return cudaSuccess;
}

}  // namespace
}  // namespace simulated

using namespace simulated;

#define FIND_STREAM(name, handle)             \
  USE_DEVICE();                               \
  const StreamRef name = find_stream(handle); \
  if (!name) return finish(cudaErrorInvalidResourceHandle)
#define FIND_EVENT(name, handle)                             \
  if (forked()) return finish(cudaErrorInitializationError); \
  Event name;                                                \
  if (!find_event(handle, &name)) return finish(cudaErrorInvalidResourceHandle)

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make_stream(stream, cudaStreamDefault, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return make_stream(stream, flags, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return make_stream(stream, flags, priority);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (forked()) return finish(cudaErrorInitializationError);
  return finish(close_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  FIND_STREAM(stream, handle);
  *priority = stream->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  FIND_STREAM(stream, handle);
  *flags = stream->flags;
  return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* device) {
  FIND_STREAM(stream, handle);
  *device = stream->device;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
  FIND_STREAM(stream, handle);
  *id = stream->id;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  FIND_STREAM(stream, handle);
  NOT_IN_CAPTURE();
  synchronize(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  FIND_STREAM(stream, handle);
  NOT_IN_CAPTURE();
  Clock seen;
  {
    std::lock_guard<std::mutex> lock(order_lock());
    if (!stream->idle()) return cudaErrorNotReady;  // no error of the thread's
    seen = stream->clock;
  }
  host_learns(seen);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  FIND_STREAM(stream, handle);
  FIND_EVENT(event, event_handle);
  const unsigned long long capture = capture_of(*stream);
  if (event.capture != 0) {
    if (capture == 0) join_capture(*stream, event.capture);
    return cudaSuccess;
  }
  if (capture != 0 && event.moment) {
    spoil_capture(capture);
    return finish(cudaErrorStreamCaptureIsolation);
  }
  if (event.moment) wait_for(stream, event.moment);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  USE_DEVICE();
  *handle = reinterpret_cast<cudaEvent_t>(new char);
  std::lock_guard<std::mutex> lock(mutex);
  events()[*handle] = {current_device(), flags, nullptr, 0};
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  if (forked()) return finish(cudaErrorInitializationError);
  std::lock_guard<std::mutex> lock(mutex);
  if (events().erase(handle) == 0) return finish(cudaErrorInvalidResourceHandle);
  delete reinterpret_cast<char*>(handle);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  FIND_STREAM(stream, stream_handle);
  FIND_EVENT(event, handle);
  // An event and the stream it is recorded on are of one device.
  if (event.device != stream->device) return finish(cudaErrorInvalidResourceHandle);
  const unsigned long long capture = capture_of(*stream);
  const MomentRef moment = capture == 0 ? mark(stream) : nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  events()[handle].moment = moment;
  events()[handle].capture = capture;
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  return cudaEventRecord(handle, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  FIND_EVENT(event, handle);
  NOT_IN_CAPTURE();
  if (event.capture != 0) return finish(cudaErrorCapturedEvent);
  return !event.moment || host_query(*event.moment) ? cudaSuccess : cudaErrorNotReady;  // no error of the thread's
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  FIND_EVENT(event, handle);
  NOT_IN_CAPTURE();
  if (event.capture != 0) return finish(cudaErrorCapturedEvent);
  if (event.moment) host_wait(*event.moment);
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t first, cudaEvent_t second) {
  FIND_EVENT(begin, first);
  FIND_EVENT(end, second);
  if (!begin.moment || !end.moment) return finish(cudaErrorInvalidResourceHandle);
  if (!begin.moment->reached() || !end.moment->reached()) return cudaErrorNotReady;
  *ms = std::chrono::duration<float, std::milli>(end.moment->time() - begin.moment->time()).count();
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  FIND_STREAM(stream, handle);
  if (is_capturing(*stream)) return cudaSuccess;
  auto before = std::make_shared<Clock>();
  enqueue(
      stream, "host function", {},
      [function, data, before] {
        // It may tell the host in any way that it has come so far.
        Clock seen;
        {
          std::lock_guard<std::mutex> lock(order_lock());
          seen = *before;
        }
        host_learns(seen);
        function(data);
      },
      nullptr, before.get());
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback, void* data, unsigned) {
  struct Call {
    cudaStream_t stream;
    cudaStreamCallback_t callback;
    void* data;
  };
  return cudaLaunchHostFunc(
      handle,
      [](void* raw) {
        const std::unique_ptr<Call> call(static_cast<Call*>(raw));
        call->callback(call->stream, cudaSuccess, call->data);
      },
      new Call{handle, callback, data});
}
}
