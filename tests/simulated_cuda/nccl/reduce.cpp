#include "reduce.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace simulated_nccl {
namespace {

// bfloat16 is the upper half of a float.
struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  Bfloat16(float value) {
    uint32_t whole;
    std::memcpy(&whole, &value, 4);
    bits = static_cast<uint16_t>((whole + 0x7fff + ((whole >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &whole, 4);
    return value;
  }
};

template <typename T, typename Wide>
bool reduce_as(void* into, const void* from, size_t count, ncclRedOp_t op) {
  T* const a = static_cast<T*>(into);
  const T* const b = static_cast<const T*>(from);
  for (size_t i = 0; i < count; ++i) {
    const Wide x = a[i], y = b[i];
    switch (op) {
      case ncclSum:
      case ncclAvg: a[i] = static_cast<T>(x + y); break;
      case ncclProd: a[i] = static_cast<T>(x * y); break;
      case ncclMax: a[i] = static_cast<T>(std::max(x, y)); break;
      case ncclMin: a[i] = static_cast<T>(std::min(x, y)); break;
      default: return false;
    }
  }
  return true;
}

template <typename T, typename Wide>
bool divide_as(void* into, size_t count, int ranks) {
  T* const a = static_cast<T*>(into);
  for (size_t i = 0; i < count; ++i) a[i] = static_cast<T>(static_cast<Wide>(a[i]) / static_cast<Wide>(ranks));
  return true;
}

}  // namespace

size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    default: return 0;
  }
}

bool reduce(void* into, const void* from, size_t count, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
    case ncclInt8: return reduce_as<int8_t, int>(into, from, count, op);
    case ncclUint8: return reduce_as<uint8_t, int>(into, from, count, op);
    case ncclInt32: return reduce_as<int32_t, int64_t>(into, from, count, op);
    case ncclUint32: return reduce_as<uint32_t, uint64_t>(into, from, count, op);
    case ncclInt64: return reduce_as<int64_t, int64_t>(into, from, count, op);
    case ncclUint64: return reduce_as<uint64_t, uint64_t>(into, from, count, op);
    case ncclFloat32: return reduce_as<float, float>(into, from, count, op);
    case ncclFloat64: return reduce_as<double, double>(into, from, count, op);
    case ncclBfloat16: return reduce_as<Bfloat16, float>(into, from, count, op);
    default: return false;
  }
}

bool finish_reduce(void* into, size_t count, ncclDataType_t type, ncclRedOp_t op, int ranks) {
  if (op != ncclAvg) return true;
  switch (type) {
    case ncclInt32: return divide_as<int32_t, int64_t>(into, count, ranks);
    case ncclInt64: return divide_as<int64_t, int64_t>(into, count, ranks);
    case ncclFloat32: return divide_as<float, float>(into, count, ranks);
    case ncclFloat64: return divide_as<double, double>(into, count, ranks);
    case ncclBfloat16: return divide_as<Bfloat16, float>(into, count, ranks);
    default: return false;
  }
}

}  // namespace simulated_nccl
