#pragma once
#include <memory>

namespace weightload {

// While it lives, the calling thread uses torch as a new thread does: Note [The caller's torch] in plain_torch.cpp.
// Around every operator of torch that the core calls, and every tensor that it makes. Costs nanoseconds on a thread
// that has nothing set, a microsecond or less on others. Needs no GIL. On the stack only: it ends on its thread.
class PlainTorch {
 public:
  PlainTorch();
  ~PlainTorch();
  PlainTorch(const PlainTorch&) = delete;
  PlainTorch& operator=(const PlainTorch&) = delete;

 private:
  struct Aside;
  std::unique_ptr<Aside> aside_;  // the caller's state; null where there is none
};

}  // namespace weightload
