#pragma once
#include <cstdint>

namespace weightload {

// Keeps the process alive where this thread reads pages of a mapped file that are no longer there: the file was
// truncated meanwhile, or cannot be read. All of the mapping is zeros from then on, and hit() says so. One at a time in
// a thread.
//
// Note [SIGBUS]
// The kernel tells of such a page by a signal, and a signal's handler is the process's. So the first guard installs
// one, for the rest of the process's life: it puts zeros in place of a mapping of which a guarded thread missed a page,
// and hands all else on to the handler that was there before, in the way that it was installed. (In place of all of the
// mapping: a part of it would be one mapping more, and a process may have no more.) Where the signal was ignored, none
// is installed. A handler that somebody installs later is left alone, also where it calls ours: nothing is guarded any
// more, since nobody can tell, and who wants a guard reads in another way.
class BusGuard {
 public:
  // [begin, end): a mapping that this thread has made for itself, and unmaps when the guard is gone.
  BusGuard(char* begin, char* end) noexcept;
  ~BusGuard();
  BusGuard(const BusGuard&) = delete;
  BusGuard& operator=(const BusGuard&) = delete;

  // Whether the memory may be touched: not where this thread blocks the signal, or somebody else's handler gets it.
  bool is_armed() const noexcept { return armed_; }

  // Whether a page was missed.
  bool hit() const noexcept;

 private:
  bool armed_;
};

}  // namespace weightload
