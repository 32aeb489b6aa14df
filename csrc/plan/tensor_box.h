#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "base/byte_range.h"

namespace weightload {

// Pieces of one size, at equal distances in a file: rows of a tensor, of each of which a part is wanted. In memory they
// lie one behind the other.
struct StridedRun {
  uint64_t begin = 0;   // of the first piece, in the file
  uint64_t piece = 0;   // bytes
  uint64_t stride = 0;  // bytes from one piece's beginning to the next one's
  uint64_t count = 1;   // pieces, at least 1

  uint64_t bytes() const { return piece * count; }
  ByteRange span() const { return {begin, begin + stride * (count - 1) + piece}; }
  bool is_contiguous() const { return count == 1 || stride == piece; }
  bool operator==(const StridedRun& other) const {
    return begin == other.begin && piece == other.piece && stride == other.stride && count == other.count;
  }
};

// Indices [begin, end) of one dimension, in the order in which they are wanted.
using IndexRanges = std::vector<std::pair<uint64_t, uint64_t>>;

// A part of a tensor: of each dimension some of its indices, as of a rank's shard.
struct TensorBox {
  std::vector<uint64_t> shape;   // of what is wanted
  std::vector<StridedRun> runs;  // of its bytes, in row-major order of that shape; none if it is empty
};

// A box of more pieces than this is refused: a run takes 32 bytes.
inline constexpr uint64_t kMostRuns = 1 << 24;

// The box of a tensor of this shape whose first byte is `begin` in its file, its elements `bits` wide. Pure. Throws
// Error{usage} for indices outside of the tensor, for another number of dimensions, and for a box that begins or ends
// inside a byte.
TensorBox box_of(uint64_t begin, const std::vector<uint64_t>& shape, uint32_t bits,
                 const std::vector<IndexRanges>& wanted);

}  // namespace weightload
