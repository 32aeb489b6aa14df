#pragma once
#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

namespace weightload {

// The number of the first name that occurs earlier in the list too; nothing where all differ.
//
// By a hash table, and by sorting as soon as hashes meet too often. The table alone would be a target: its hash is
// known, so a file can be made whose names all have the same one, and then takes hours to open.
std::optional<size_t> first_repeated(const std::vector<std::string_view>& names);

// The numbers of all names that occur more than once, those of one name together and ascending, names in the order in
// which they first repeat. O(n log n) where some do, whatever the names.
std::vector<std::vector<size_t>> all_repeated(const std::vector<std::string_view>& names);

}  // namespace weightload
