#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "clock.h"

namespace simulated {

struct Access {
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool writes = false;
};

// One operation of a stream.
struct Step {
  const char* what = nullptr;  // null: nobody
  size_t stream = 0;
  uint64_t number = 0;
};

// Note [Happens before]
// An operation is ordered behind those before it on its stream, behind what the events lie behind that its stream was
// made to wait for, and behind what the host had waited for when it queued it. All of that is known when the operation
// is queued, so races are found then, whatever the delays do. Two accesses to a byte, one of them a write, must be
// ordered; how the bytes came out does not matter.
//
// The host counts as one: which of its threads waited for an event is not looked at, since how they tell each other
// (mutexes, futures) is not seen. Races between two of its threads can therefore go unnoticed, and none is made up.
//
// Remembers for every byte that streams use the last write and the reads since. The caller holds the order lock.
class Checker {
 public:
  // `names` a stream for a report.
  explicit Checker(std::function<std::string(size_t)> names) : names_(std::move(names)) {}

  void access(const Access& access, const Step& step, const Clock& known);

  // Whether whatever streams do to the bytes (or only their writes) lies behind what is known.
  bool settled(uintptr_t begin, size_t bytes, const Clock& known, bool writes_only) const;

  // The accesses that are not known to be done, for a report.
  std::string unsettled(uintptr_t begin, size_t bytes, const Clock& known) const;

  // The memory is given back; other memory may come to lie there.
  void forget(uintptr_t begin, size_t bytes);

 private:
  struct Segment {
    uintptr_t end = 0;
    Step write;
    std::vector<Step> reads;  // of each stream the last
  };

  void split(uintptr_t at);
  void report(const Access& access, const Step& step, const Step& other, bool other_writes, uintptr_t begin,
              uintptr_t end) const;

  std::function<std::string(size_t)> names_;
  std::map<uintptr_t, Segment> segments_;
};

}  // namespace simulated
