#include "bindings/tensor_meta.h"

#include <limits>

#include "base/error.h"

namespace weightload {
namespace {

[[noreturn]] void fail_tensor(const TensorInfo& info, const std::string& path, const std::string& what) {
  throw Error(ErrorKind::tensor, what, {path, info.name, {}, 0});
}

c10::ScalarType torch_dtype(const TensorInfo& info, const std::string& path) {
  switch (info.dtype) {
    case Dtype::BOOL: return c10::ScalarType::Bool;
    case Dtype::F4: return c10::ScalarType::Float4_e2m1fn_x2;
    case Dtype::U8: return c10::ScalarType::Byte;
    case Dtype::I8: return c10::ScalarType::Char;
    case Dtype::F8_E5M2: return c10::ScalarType::Float8_e5m2;
    case Dtype::F8_E4M3: return c10::ScalarType::Float8_e4m3fn;
    case Dtype::F8_E8M0: return c10::ScalarType::Float8_e8m0fnu;
    case Dtype::F8_E4M3FNUZ: return c10::ScalarType::Float8_e4m3fnuz;
    case Dtype::F8_E5M2FNUZ: return c10::ScalarType::Float8_e5m2fnuz;
    case Dtype::I16: return c10::ScalarType::Short;
    case Dtype::U16: return c10::ScalarType::UInt16;
    case Dtype::F16: return c10::ScalarType::Half;
    case Dtype::BF16: return c10::ScalarType::BFloat16;
    case Dtype::I32: return c10::ScalarType::Int;
    case Dtype::U32: return c10::ScalarType::UInt32;
    case Dtype::F32: return c10::ScalarType::Float;
    case Dtype::C64: return c10::ScalarType::ComplexFloat;
    case Dtype::F64: return c10::ScalarType::Double;
    case Dtype::I64: return c10::ScalarType::Long;
    case Dtype::U64: return c10::ScalarType::UInt64;
    case Dtype::F6_E2M3:
    case Dtype::F6_E3M2: break;
  }
  fail_tensor(info, path, "torch has no dtype for " + std::string(dtype_name(info.dtype)));
}

Sizes torch_sizes(const TensorInfo& info, const std::string& path) {
  Sizes sizes;
  for (uint64_t extent : info.shape) {
    if (extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      fail_tensor(info, path, "torch cannot hold a dimension of " + std::to_string(extent));
    sizes.push_back(static_cast<int64_t>(extent));
  }
  if (const int64_t pack = dtype_pack(info.dtype); pack > 1) {
    if (sizes.empty() || sizes.back() % pack != 0) {
      const std::string number = std::to_string(pack);
      fail_tensor(info, path, "f4_x2 dtype requires that the last dim be divisible by " + number + " in torch");
    }
    sizes.back() /= pack;
  }
  return sizes;
}

// Row-major strides. Only an empty tensor's can leave 64 bits, where their values do not matter: unsigned, so that
// wrapping round is defined. torch refuses those that come out negative.
Sizes contiguous_strides(const Sizes& sizes, const TensorInfo& info, const std::string& path) {
  Sizes strides(sizes.size());
  uint64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = static_cast<int64_t>(stride);
    if (strides[i] < 0) fail_tensor(info, path, "torch cannot hold the strides of its shape: they overflow");
    stride *= static_cast<uint64_t>(sizes[i] > 0 ? sizes[i] : 1);
  }
  return strides;
}

}  // namespace

TensorMeta torch_meta(const TensorInfo& info, const std::string& path) {
  TensorMeta meta{torch_dtype(info, path), torch_sizes(info, path), {}};
  meta.strides = contiguous_strides(meta.sizes, info, path);
  return meta;
}

}  // namespace weightload
