// How a problem is cut into chunks. A chunk is what one warp or block sums in one go; its extent follows from the
// problem's shape and dtypes alone, never from the device or the grid, and so does the order of summation.
#pragma once

#include <cstdint>

namespace vidfast::cuda {

// Planes: many neighbouring elements of one channel. A chunk is a piece of a plane, or several outer indices of
// one plane, and is walked by one warp.
struct PlaneChunks {
  int64_t piece;   // elements of a plane in a chunk
  int64_t pieces;  // of a plane
  int64_t outer;   // outer indices in a chunk
  int64_t outer_blocks;
  int64_t count;  // outer_blocks * channels * pieces; piece runs fastest, then the channel
};

// Rows: planes too small for that, and channel-fastest layouts (inner = 1). `join` rows that lie back to back are
// one row of `columns`; column j belongs to run j / inner, run q to channel q % C. A thread keeps its columns and
// goes down the rows, a block's warps stand `across` by `down`, and a chunk is `tile` columns of some rows.
struct RowChunks {
  int64_t join, columns;
  int64_t rows;  // of `columns` each; the last may be incomplete
  int64_t complete_rows;
  int across, down;     // warps
  int64_t tile, tiles;  // columns in a block, blocks in a row
  int64_t chunk_rows, row_chunks;
  // A run cut by the edge of a tile has a sum on either side: the sum of run q in tile t is number q + t.
  int64_t sums;  // of one row chunk: runs + tiles
  // With more row chunks than kGroup, the last of each group to finish adds the group's sums.
  int64_t groups;  // 0: not grouped
  int64_t count;   // tiles * row_chunks; the tile runs fastest
};

constexpr int64_t kGroup = 32;

// The free numbers of the host's code: any value gives right sums, and which is fastest is for a GPU to say. What
// decided each is in docs/kernel-notes.md. With VIDFAST_TUNE a search may change them while the program runs
// (`bench/gpu`); otherwise they are constants.
#ifdef VIDFAST_TUNE
#define VIDFAST_FREE inline int64_t
#else
#define VIDFAST_FREE constexpr int64_t
#endif
// From this many neighbouring elements on a plane is walked as a plane.
VIDFAST_FREE kPlane = 1024;
// A warp's chunk of planes: 4 to 32 vectors a lane. At the upper end a lane's running sums take 32 values each and the
// partial sums are next to no traffic; even a small problem has kChunks chunks.
VIDFAST_FREE kFewestVectors = 128;
VIDFAST_FREE kMostVectors = 1024;
VIDFAST_FREE kChunks = 4096;
// A thread's rows in a chunk, and the blocks' chunks wanted.
VIDFAST_FREE kFewestRows = 4;
VIDFAST_FREE kMostRows = 64;
VIDFAST_FREE kBlocks = 1024;
// Full loads of the device in a grid, at most.
VIDFAST_FREE kLoads = 4;
#undef VIDFAST_FREE

PlaneChunks cut_planes(int64_t outer, int64_t channels, int64_t inner, int width);
// back_to_back: every tensor's outer stride is channels * inner.
RowChunks cut_rows(int64_t outer, int64_t channels, int64_t inner, int width, bool back_to_back);

}  // namespace vidfast::cuda
