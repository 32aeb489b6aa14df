#include "input.h"

#include <algorithm>
#include <cstring>

Input read_input(std::string_view bytes) {
  Input input;
  const size_t given = std::min(bytes.size(), kChoicesBytes);
  if (given > 0) std::memcpy(&input.choices, bytes.data(), given);
  input.choices.more_bytes &= (uint64_t{1} << 62) - 1;
  input.file = bytes.substr(given);
  return input;
}

std::string write_input(const Choices& choices, std::string_view file) {
  std::string bytes(kChoicesBytes, '\0');
  std::memcpy(bytes.data(), &choices, kChoicesBytes);
  return bytes.append(file);
}

uint64_t mix(uint64_t a, uint64_t b, uint64_t c) {
  uint64_t value = a * 0x9E3779B97F4A7C15u ^ b * 0xC2B2AE3D27D4EB4Fu ^ c * 0x165667B19E3779F9u;
  value = (value ^ value >> 31) * 0xBF58476D1CE4E5B9u;
  return value ^ value >> 29;
}
