#include "format/dtype.h"

#include <array>
#include <cstddef>

namespace weightload {
namespace {

struct DtypeFacts {
  std::string_view name;
  uint32_t bits;
  uint32_t alignment;  // bytes
  uint32_t pack = 1;   // elements in one of torch's
};

constexpr std::array<DtypeFacts, kDtypeCount> kFacts = {{
    {"BOOL", 8, 1},        {"F4", 4, 1, 2},   {"F6_E2M3", 6, 1}, {"F6_E3M2", 6, 1}, {"U8", 8, 1},
    {"I8", 8, 1},          {"F8_E5M2", 8, 1}, {"F8_E4M3", 8, 1}, {"F8_E8M0", 8, 1}, {"F8_E4M3FNUZ", 8, 1},
    {"F8_E5M2FNUZ", 8, 1}, {"I16", 16, 2},    {"U16", 16, 2},    {"F16", 16, 2},    {"BF16", 16, 2},
    {"I32", 32, 4},        {"U32", 32, 4},    {"F32", 32, 4},    {"C64", 64, 8},    {"F64", 64, 8},
    {"I64", 64, 8},        {"U64", 64, 8},
}};

const DtypeFacts& facts(Dtype dtype) { return kFacts[static_cast<size_t>(dtype)]; }

}  // namespace

std::string_view dtype_name(Dtype dtype) { return facts(dtype).name; }
uint32_t dtype_bits(Dtype dtype) { return facts(dtype).bits; }
uint32_t dtype_alignment(Dtype dtype) { return facts(dtype).alignment; }
uint32_t dtype_pack(Dtype dtype) { return facts(dtype).pack; }

std::optional<Dtype> dtype_from_name(std::string_view name) {
  for (size_t i = 0; i < kFacts.size(); ++i) {
    if (kFacts[i].name == name) return static_cast<Dtype>(i);
  }
  return std::nullopt;
}

}  // namespace weightload
