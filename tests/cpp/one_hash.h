// Names that a hash table would put into one place.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// Strings of eight bytes that GNU's hash (Murmur) tells apart by its highest bit alone. The next such pair takes that
// bit back, so every choice among n pairs of pairs has the same hash.
inline std::pair<std::string, std::string> pair_of(uint64_t word) {
  constexpr uint64_t kFactor = 0xc6a4a7935bd1e995, kInverse = 0x5f7a0ea7e59b19bd;
  static_assert(kFactor * kInverse == 1);
  uint64_t mixed = word * kFactor;
  mixed = (mixed ^ mixed >> 47) * kFactor ^ 1ull << 63;
  uint64_t other = mixed * kInverse;
  other = (other ^ other >> 47) * kInverse;
  return {std::string(reinterpret_cast<const char*>(&word), 8), std::string(reinterpret_cast<const char*>(&other), 8)};
}

inline std::vector<std::string> names_of_one_hash(unsigned pairs) {
  std::vector<std::string> names = {""};
  for (unsigned i = 0; i < pairs; ++i) {
    const auto first = pair_of(2 * i + 1), second = pair_of(2 * i + 2);
    std::vector<std::string> longer;
    for (const std::string& name : names) {
      longer.push_back(name + first.first + second.first);
      longer.push_back(name + first.second + second.second);
    }
    names = std::move(longer);
  }
  return names;
}
