#pragma once
#include "base/look.h"
#include "io/range_reader.h"
#include "plan/tensor_box.h"

namespace weightload {

// Reads the pieces of a run, one behind the other, to `destination`; by way of a buffer of its own where a read of all
// that lies between them costs less than a read a piece. Through the page cache, but for large pieces.
//
// Note [Pieces of rows]
// A rank that wants a part of each row reads as many pieces as there are rows. A read of its own costs about as much as
// copying 8 KiB does, so pieces that lie closer together are read with what is between them, into a buffer that stays
// in the processor's cache, unless that would more than double what is read. From storage the same holds with other
// figures; but bytes between pieces are mostly those of another rank of the machine, which needs them in the page
// cache, too.
void read_strided(RangeReader& reader, const StridedRun& run, char* destination, const Look& look);

}  // namespace weightload
