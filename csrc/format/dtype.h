#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

namespace weightload {

// The element types that safetensors 0.8 knows, in its order. F4 and the F6 types are packed: their
// elements share bytes, so sizes are counted in bits.
enum class Dtype : uint8_t {
  BOOL,
  F4,
  F6_E2M3,
  F6_E3M2,
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,
  F64,
  I64,
  U64,
};

inline constexpr int kDtypeCount = static_cast<int>(Dtype::U64) + 1;

std::string_view dtype_name(Dtype dtype);
uint32_t dtype_bits(Dtype dtype);

// How many elements torch's type of it holds, whose tensors count those in their last dimension: 1, or 2 of F4.
uint32_t dtype_pack(Dtype dtype);

std::optional<Dtype> dtype_from_name(std::string_view name);

// Alignment in bytes that the element type asks of memory: its size, 1 for packed types, 8 for C64.
uint32_t dtype_alignment(Dtype dtype);

}  // namespace weightload
