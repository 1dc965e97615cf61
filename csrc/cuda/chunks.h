// How a problem is cut into chunks. A chunk is what one warp or block sums in one go; its extent follows from the
// problem's shape and dtypes alone, never from the device or the grid, and so does the order of summation.
#pragma once

#include <cstdint>

namespace vidfast::cuda {

// n / d by a multiplication, for 0 <= n < 2^62: a kernel finds its place before it loads anything, and the device has
// no division of integers. With s = ceil(log2 d) and the factor f = ceil(2^(63 + s) / d), f d exceeds 2^(63 + s) by
// less than 2^s, so that n f / 2^(63 + s) exceeds n / d by less than 1 / d (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  uint64_t factor;
  int shift;  // s
};
Divisor divisor(int64_t d);

// Planes: many neighbouring elements of one channel. A chunk is a piece of a plane, or several outer indices of
// one plane, and is walked by one warp.
struct PlaneChunks {
  int64_t piece;   // elements of a plane in a chunk
  int64_t pieces;  // of a plane
  int64_t outer;   // outer indices in a chunk
  int64_t outer_blocks;
  int64_t count;  // outer_blocks * channels * pieces; piece runs fastest, then the channel
  Divisor by_pieces, by_channels;
};

// Rows: planes too small for that, and channel-fastest layouts (inner = 1). `join` rows that follow one another are
// one row of `columns`; column j belongs to run j / inner, run q to channel q % C. A thread keeps its columns and
// goes down the rows, a block's warps stand `across` by `down`, and a chunk is `tile` columns of some rows.
struct RowChunks {
  int64_t join, columns;
  int64_t rows;  // of `columns` each; the last may be incomplete
  int64_t complete_rows;
  int across, across_bits, down;  // warps
  int tile_bits;                  // log2 of the tile
  int64_t tile, tiles;            // columns in a block, blocks in a row
  int most_runs;                  // that a tile meets: each of them has a scale in shared memory
  int64_t chunk_rows, row_chunks;
  int64_t count;  // tiles * row_chunks; the tile runs fastest
  Divisor by_tiles, by_inner, by_channels;
  // Partial sums: one for each run, or for each channel where a row is one tile, whose block adds the channel's runs.
  // Where the edges of tiles cut runs, each side has a sum: that of run q in tile t is number q + t.
  int64_t added;  // runs of a channel that a block adds: join or 1
  bool whole;     // no run is cut
  int64_t sums;   // of one row chunk
};

// How the partial sums are added: a block takes `across` channels, `deep` threads each. Both are powers of two.
struct FinishBlocks {
  int64_t depth;  // partial sums of a channel, those of cut runs counted once
  int across, across_bits, deep;
  int64_t blocks;
};

// The free numbers of the host's code: any value gives right sums, and which is fastest is for a GPU to say. What
// decided each is in docs/kernel-notes.md. With VIDFAST_TUNE a search may change them while the program runs
// (`bench/gpu`); otherwise they are constants.
#ifdef VIDFAST_TUNE
#define VIDFAST_FREE inline int64_t
#else
#define VIDFAST_FREE constexpr int64_t
#endif
// From this many neighbouring elements on a plane is walked as a plane.
VIDFAST_FREE kPlane = 256;
// A warp's chunk of planes: 4 to 32 vectors a lane. At the upper end a lane's running sums take 32 values each and the
// partial sums are next to no traffic; even a small problem has kChunks chunks.
VIDFAST_FREE kFewestVectors = 128;
VIDFAST_FREE kMostVectors = 1024;
VIDFAST_FREE kChunks = 4096;
// A thread's rows in a chunk, and the blocks' chunks wanted.
VIDFAST_FREE kFewestRows = 4;
VIDFAST_FREE kMostRows = 64;
VIDFAST_FREE kBlocks = 256;
// Partial sums that a thread of the finish adds: at most, where one block does it alone, and about, where more do.
VIDFAST_FREE kAlone = 16;
VIDFAST_FREE kShare = 8;
// 1: the finish starts while the sweep ends, and waits for its sums (compute capability 9.0 and later); 0: behind it.
VIDFAST_FREE kOverlap = 1;
// 1: a warp's first batch is asked for while its channels' variances are computed.
VIDFAST_FREE kPrefetch = 1;
#undef VIDFAST_FREE

// Vectors in a warp's chunk, of so many in all: kChunks chunks, of kFewestVectors to `most`.
int64_t warp_vectors(int64_t all, int64_t most);

PlaneChunks cut_planes(int64_t outer, int64_t channels, int64_t inner, int width);
// back_to_back: every tensor's outer stride is channels * inner.
RowChunks cut_rows(int64_t outer, int64_t channels, int64_t inner, int width, bool back_to_back);
FinishBlocks cut_finish(int64_t depth, int64_t channels);

}  // namespace vidfast::cuda
