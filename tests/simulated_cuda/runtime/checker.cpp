#include "checker.h"

#include <algorithm>
#include <cstdio>

#include "report.h"

namespace simulated {
namespace {

bool known_to(const Clock& known, const Step& step) {
  return step.what == nullptr || known.of(step.stream) >= step.number;
}

std::string hex(uintptr_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void Checker::split(uintptr_t at) {
  auto after = segments_.upper_bound(at);
  if (after == segments_.begin()) return;
  auto& [begin, segment] = *std::prev(after);
  if (begin == at || segment.end <= at) return;
  Segment second = segment;
  segment.end = at;
  segments_.emplace(at, std::move(second));
}

void Checker::access(const Access& access, const Step& step, const Clock& known) {
  if (access.bytes == 0) return;
  const uintptr_t end = access.begin + access.bytes;
  split(access.begin);
  split(end);
  const auto first = segments_.lower_bound(access.begin);
  const auto last = segments_.lower_bound(end);
  // One report of each other operation, with the first range that both touch.
  std::vector<Step> told;
  const auto check = [&](const Step& other, bool writes, uintptr_t from, uintptr_t to) {
    if (known_to(known, other)) return;
    for (const Step& one : told)
      if (one.stream == other.stream && one.number == other.number) return;
    told.push_back(other);
    report(access, step, other, writes, from, to);
  };
  for (auto it = first; it != last; ++it) {
    check(it->second.write, true, it->first, it->second.end);
    if (access.writes)
      for (const Step& read : it->second.reads) check(read, false, it->first, it->second.end);
  }
  if (access.writes) {
    segments_.erase(first, last);
    segments_[access.begin] = Segment{end, step, {}};
    return;
  }
  uintptr_t at = access.begin;
  for (auto it = first; it != last; ++it) {
    if (it->first > at) segments_[at] = Segment{it->first, {}, {step}};
    auto& reads = it->second.reads;
    const auto same = std::find_if(reads.begin(), reads.end(), [&](const Step& r) { return r.stream == step.stream; });
    if (same != reads.end())
      *same = step;
    else
      reads.push_back(step);
    at = it->second.end;
  }
  if (at < end) segments_[at] = Segment{end, {}, {step}};
}

bool Checker::settled(uintptr_t begin, size_t bytes, const Clock& known, bool writes_only) const {
  auto it = segments_.upper_bound(begin);
  if (it != segments_.begin() && std::prev(it)->second.end > begin) --it;
  for (; it != segments_.end() && it->first < begin + bytes; ++it) {
    if (!known_to(known, it->second.write)) return false;
    if (writes_only) continue;
    for (const Step& read : it->second.reads)
      if (!known_to(known, read)) return false;
  }
  return true;
}

std::string Checker::unsettled(uintptr_t begin, size_t bytes, const Clock& known) const {
  auto it = segments_.upper_bound(begin);
  if (it != segments_.begin() && std::prev(it)->second.end > begin) --it;
  for (; it != segments_.end() && it->first < begin + bytes; ++it) {
    std::vector<Step> steps = it->second.reads;
    steps.push_back(it->second.write);
    for (const Step& step : steps)
      if (!known_to(known, step)) return std::string(step.what) + " on " + names_(step.stream);
  }
  return "";
}

void Checker::forget(uintptr_t begin, size_t bytes) {
  split(begin);
  split(begin + bytes);
  segments_.erase(segments_.lower_bound(begin), segments_.lower_bound(begin + bytes));
}

void Checker::report(const Access& access, const Step& step, const Step& other, bool other_writes, uintptr_t begin,
                     uintptr_t end) const {
  const auto one = [&](const Step& s, bool writes) {
    return std::string(s.what) + " (operation " + std::to_string(s.number) + ") on " + names_(s.stream) +
           (writes ? " writes" : " reads");
  };
  add_report("race: " + one(step, access.writes) + " [" + hex(access.begin) + ", " + hex(access.begin + access.bytes) +
             "), of which " + one(other, other_writes) + " [" + hex(begin) + ", " + hex(end) +
             "): nothing orders the two");
}

}  // namespace simulated
