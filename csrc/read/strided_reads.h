#pragma once
#include "base/look.h"
#include "plan/tensor_box.h"
#include "read/range_reader.h"

namespace weightload {

// Reads the pieces of a run, one behind the other, to `destination`; by way of a buffer of its own where a read of all
// that lies between them costs less than a read a piece. Through the page cache, but for large pieces. `past_caches`:
// as of RangeReader::buffered; what is in the page cache is then copied piece by piece, without reads.
//
// Note [Pieces of rows]
// A rank that wants a part of each row reads as many pieces as there are rows. A read of its own costs about as much as
// copying 8 KiB does, so pieces that lie closer together are read with what is between them, into a buffer that stays
// in the processor's cache, unless that would more than double what is read. A request to storage costs about as much
// as 16 KiB from it do: pieces that lie closer together come into the page cache with what is between them, which is
// mostly what another rank of the machine needs there, too. A request to a server costs about as much as 2 MiB do:
// pieces that lie closer together come with what is between them, however much that is.
void read_strided(RangeReader& reader, const StridedRun& run, char* destination, const Look& look,
                  bool past_caches = false);

}  // namespace weightload
