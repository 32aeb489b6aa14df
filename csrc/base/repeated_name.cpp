#include "base/repeated_name.h"

#include <algorithm>
#include <cstdint>
#include <functional>

namespace weightload {
namespace {

struct Entry {
  size_t hash;  // tells ordinary names apart without looking at them
  size_t number;
};

using Names = std::vector<std::string_view>;

// How many places of the table a name may look at, all names taken together: three times what ordinary ones do.
constexpr size_t kLooksANameMayTake = 4;

// O(n), or false where the names' hashes meet too often to go on: they may have been made to.
bool search_table(const Names& names, std::optional<size_t>& first) {
  size_t size = 2;
  while (size < 2 * names.size()) size *= 2;
  std::vector<Entry> table(size, Entry{0, names.size()});
  size_t looks = kLooksANameMayTake * names.size();
  for (size_t i = 0; i < names.size(); ++i) {
    const size_t hash = std::hash<std::string_view>()(names[i]);
    for (size_t at = hash & (size - 1);; at = (at + 1) & (size - 1)) {
      if (looks-- == 0) return false;
      Entry& entry = table[at];
      if (entry.number == names.size()) {
        entry = {hash, i};
        break;
      }
      if (entry.hash == hash && names[entry.number] == names[i]) return first = i, true;
    }
  }
  return true;
}

// All names, equal ones together, each with its first number first. O(n log n), whatever the names.
std::vector<Entry> sorted_entries(const Names& names) {
  std::vector<Entry> entries;
  entries.reserve(names.size());
  for (size_t i = 0; i < names.size(); ++i) entries.push_back({std::hash<std::string_view>()(names[i]), i});
  std::sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    if (a.hash != b.hash) return a.hash < b.hash;
    const int order = names[a.number].compare(names[b.number]);
    return order != 0 ? order < 0 : a.number < b.number;
  });
  return entries;
}

bool same(const Names& names, const Entry& a, const Entry& b) {
  return a.hash == b.hash && names[a.number] == names[b.number];
}

std::optional<size_t> search_sorted(const Names& names) {
  const std::vector<Entry> entries = sorted_entries(names);
  std::optional<size_t> first;
  for (size_t i = 1; i < entries.size(); ++i) {
    if (!same(names, entries[i - 1], entries[i])) continue;
    if (!first || entries[i].number < *first) first = entries[i].number;
  }
  return first;
}

}  // namespace

std::optional<size_t> first_repeated(const std::vector<std::string_view>& names) {
  std::optional<size_t> first;
  return search_table(names, first) ? first : search_sorted(names);
}

std::vector<std::vector<size_t>> all_repeated(const Names& names) {
  std::vector<std::vector<size_t>> repeated;
  if (!first_repeated(names)) return repeated;
  const std::vector<Entry> entries = sorted_entries(names);
  for (size_t begin = 0, end = 0; begin < entries.size(); begin = end) {
    for (end = begin + 1; end < entries.size() && same(names, entries[begin], entries[end]);) ++end;
    if (end - begin < 2) continue;
    std::vector<size_t>& numbers = repeated.emplace_back();
    for (size_t i = begin; i < end; ++i) numbers.push_back(entries[i].number);
  }
  std::sort(repeated.begin(), repeated.end(), [](const auto& a, const auto& b) { return a[1] < b[1]; });
  return repeated;
}

}  // namespace weightload
