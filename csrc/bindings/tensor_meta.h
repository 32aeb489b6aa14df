#pragma once
#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>

#include <string>

#include "format/header.h"

namespace weightload {

using Sizes = c10::SmallVector<int64_t, 8>;

// What torch calls a tensor of a safetensors file.
struct TensorMeta {
  c10::ScalarType dtype;
  Sizes sizes;    // elements; of F4, whose torch type packs two, the last dimension counts pairs
  Sizes strides;  // row-major
};

// Throws Error{tensor} for dtypes and shapes that torch lacks; `path` serves the message.
TensorMeta torch_meta(const TensorInfo& info, const std::string& path);

}  // namespace weightload
