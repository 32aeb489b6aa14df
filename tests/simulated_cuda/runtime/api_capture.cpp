// Stream capture: the rules around it, not the graph.
#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "capture.h"
#include "device.h"
#include "errors.h"

namespace simulated {
namespace {

struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  unsigned long long id;
  bool spoilt;
  bool forked;  // came in by an event, and ends with the capture
};

std::mutex mutex;
std::map<const Stream*, Capture>& captures() {
  static auto* const one = new std::map<const Stream*, Capture>;
  return *one;
}
unsigned long long captured_ever = 0;
std::atomic<int> under_way{0};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

}  // namespace

unsigned long long capture_of(const Stream& stream) {
  if (under_way == 0) return 0;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = captures().find(&stream);
  return found == captures().end() ? 0 : found->second.id;
}

bool is_capturing(const Stream& stream) { return capture_of(stream) != 0; }

void join_capture(const Stream& stream, unsigned long long capture) {
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [other, its] : std::map<const Stream*, Capture>(captures())) {
    if (its.id != capture) continue;
    captures().emplace(&stream, Capture{its.mode, its.thread, its.id, its.spoilt, true});
    return;
  }
}

void spoil_capture(unsigned long long capture) {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& [stream, its] : captures())
    if (its.id == capture) its.spoilt = true;
}

cudaError_t check_capture() {
  if (under_way == 0 || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  std::lock_guard<std::mutex> lock(mutex);
  cudaError_t verdict = cudaSuccess;
  for (auto& [stream, capture] : captures()) {
    const bool mine = capture.thread == std::this_thread::get_id();
    const bool global = capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (global || (mine && capture.mode != cudaStreamCaptureModeRelaxed)) {
      capture.spoilt = true;
      verdict = cudaErrorStreamCaptureUnsupported;
    }
  }
  return verdict;
}

}  // namespace simulated

using namespace simulated;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  USE_DEVICE();
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  if (stream == legacy_stream(stream->device)) return finish(cudaErrorStreamCaptureUnsupported);
  std::lock_guard<std::mutex> lock(mutex);
  if (!captures()
           .emplace(stream.get(), Capture{mode, std::this_thread::get_id(), ++captured_ever, false, false})
           .second) {
    return finish(cudaErrorIllegalState);
  }
  ++under_way;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = captures().find(stream.get());
  if (found == captures().end()) return finish(cudaErrorIllegalState);
  const Capture ended = found->second;
  if (ended.forked) return finish(cudaErrorStreamCaptureUnmatched);
  bool spoilt = ended.spoilt;
  for (auto it = captures().begin(); it != captures().end();) {
    const bool part = it->second.id == ended.id;
    spoilt = spoilt || (part && it->second.spoilt);
    it = part ? captures().erase(it) : std::next(it);
  }
  --under_way;
  *graph = nullptr;
  if (spoilt) return finish(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(new int(0));  // empty, and good for cudaGraphDestroy only
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<int*>(graph);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = captures().find(stream.get());
  *status = found == captures().end() ? cudaStreamCaptureStatusNone
            : found->second.spoilt    ? cudaStreamCaptureStatusInvalidated
                                      : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  const cudaError_t error = cudaStreamIsCapturing(handle, status);
  if (error != cudaSuccess) return error;
  if (graph != nullptr) *graph = nullptr;
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = captures().find(find_stream(handle).get());
  if (id != nullptr) *id = found == captures().end() ? 0 : found->second.id;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
}
