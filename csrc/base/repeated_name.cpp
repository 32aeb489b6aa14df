#include "base/repeated_name.h"

#include <algorithm>
#include <functional>

namespace weightload {

std::optional<size_t> first_repeated(const std::vector<std::string_view>& names) {
  struct Entry {
    size_t hash;  // sorts ordinary names without looking at them
    size_t number;
  };
  std::vector<Entry> entries;
  entries.reserve(names.size());
  for (size_t i = 0; i < names.size(); ++i) entries.push_back({std::hash<std::string_view>()(names[i]), i});
  std::sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    if (a.hash != b.hash) return a.hash < b.hash;
    const int order = names[a.number].compare(names[b.number]);
    return order != 0 ? order < 0 : a.number < b.number;
  });
  std::optional<size_t> first;
  for (size_t i = 1; i < entries.size(); ++i) {
    const Entry &before = entries[i - 1], &entry = entries[i];
    if (before.hash != entry.hash || names[before.number] != names[entry.number]) continue;
    if (!first || entry.number < *first) first = entry.number;
  }
  return first;
}

}  // namespace weightload
