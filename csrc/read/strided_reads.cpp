#include "read/strided_reads.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "base/error.h"

namespace weightload {
namespace {

constexpr uint64_t kLeastReadGap = 8 << 10;
constexpr uint64_t kMostOverread = 2;            // times what is wanted
constexpr uint64_t kStridedScratch = 128 << 10;  // fits the second-level cache

// What storage brings in of a gap costs less than another request to it.
constexpr uint64_t kLeastColdGap = 16 << 10;

// Larger pieces are each worth asking whether they are in the page cache, and a direct read if not.
constexpr uint64_t kLargePiece = 256 << 10;

constexpr uint64_t kCopiedBetweenLooks = 2 << 20;  // with what is between the pieces

// A request to a server costs as much as so many bytes from it do: 16 ms at 1 Gbit/s.
constexpr uint64_t kLeastRequestedGap = 2 << 20;
constexpr uint64_t kRequestedScratch = 8 << 20;

bool is_dense(const RangeReader& reader, const StridedRun& run) {
  if (reader.asks_server()) return run.stride - run.piece < kLeastRequestedGap;
  return run.stride - run.piece < kLeastReadGap && run.stride <= kMostOverread * run.piece &&
         run.stride + run.piece <= kStridedScratch;
}

// The pieces from `done` on of a run.
StridedRun rest_of(const StridedRun& run, uint64_t done, uint64_t most) {
  return {run.begin + done * run.stride, run.piece, run.stride, std::min(most, run.count - done)};
}

// Copies pieces that should be in the page cache until that cannot be done. How many are there.
uint64_t copy_pieces(RangeReader& reader, RangeReader::Attempt& attempt, const StridedRun& run, char* destination) {
  const uint64_t most = std::max<uint64_t>(1, kCopiedBetweenLooks / run.stride);
  uint64_t done = 0;
  while (done < run.count) {
    attempt.look();
    const StridedRun part = rest_of(run, done, most);
    const ByteRange first{part.begin, part.begin + part.piece};
    if (!reader.copy_pieces(attempt, first, part.stride, part.count, destination + done * run.piece)) break;
    done += part.count;
  }
  return done;
}

void read_dense(RangeReader& reader, const StridedRun& run, char* destination, const Look& look, bool past_caches) {
  RangeReader::Attempt attempt = reader.begin(run.span(), look, /*may_be_direct=*/false);
  const uint64_t copied = past_caches ? copy_pieces(reader, attempt, run, destination) : 0;
  destination += copied * run.piece;
  const uint64_t bytes = reader.asks_server() ? std::max(kRequestedScratch, run.piece) : kStridedScratch;
  const std::unique_ptr<char[]> scratch(new char[std::min(bytes, run.span().size())]);
  const uint64_t most = 1 + (bytes - run.piece) / run.stride;
  for (uint64_t done = copied; done < run.count; done += most) {
    const StridedRun part = rest_of(run, done, most);
    reader.buffered(attempt, part.span(), scratch.get());
    for (uint64_t p = 0; p < part.count; ++p) {
      std::memcpy(destination, scratch.get() + p * part.stride, part.piece);
      destination += part.piece;
    }
  }
  reader.end(attempt);
}

}  // namespace

void read_strided(RangeReader& reader, const StridedRun& run, char* destination, const Look& look, bool past_caches) {
  // Scratch memory is used again before end(), and not every attempt has one.
  if (reader.is_tapped()) throw Error(ErrorKind::usage, "parts of tensors are not read from a file with a tap");
  if (is_dense(reader, run)) return read_dense(reader, run, destination, look, past_caches);
  // What is not in the page cache is brought in with what lies between.
  const bool near = run.piece < kLargePiece && run.stride - run.piece < kLeastColdGap;
  RangeReader::Attempt whole =
      near ? reader.begin(run.span(), look, /*may_be_direct=*/false) : reader.begin_scattered(run.span(), look);
  const uint64_t copied = past_caches ? copy_pieces(reader, whole, run, destination) : 0;
  destination += copied * run.piece;
  for (uint64_t p = copied; p < run.count; ++p, destination += run.piece) {
    const ByteRange piece{run.begin + p * run.stride, run.begin + p * run.stride + run.piece};
    if (run.piece < kLargePiece) {
      reader.buffered(whole, piece, destination);
      continue;
    }
    RangeReader::Attempt attempt = reader.begin(piece, look, /*may_be_direct=*/false);
    reader.buffered(attempt, piece, destination);
    reader.end(attempt);
  }
  if (near) reader.end(whole);
}

}  // namespace weightload
