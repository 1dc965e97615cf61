#include "chunks.h"

#include <algorithm>
#include <numeric>

namespace vidfast::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t floor_power_of_two(int64_t n) {
  int64_t p = 1;
  while (2 * p <= n) p *= 2;
  return p;
}

int64_t ceil_power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// log2, rounded up.
int bits(int64_t n) {
  int b = 0;
  while ((int64_t{1} << b) < n) ++b;
  return b;
}

}  // namespace

Divisor divisor(int64_t d) {
  const int shift = bits(d);
  const unsigned __int128 numerator = static_cast<unsigned __int128>(1) << (63 + shift);
  return {static_cast<uint64_t>((numerator + d - 1) / d), shift};
}

int64_t warp_vectors(int64_t all, int64_t most) {
  return std::clamp(floor_power_of_two(all / kChunks), std::min(kFewestVectors, most), most);
}

PlaneChunks cut_planes(int64_t outer, int64_t channels, int64_t inner, int width) {
  const int64_t vectors = outer * channels * inner / width;
  const int64_t elements = width * warp_vectors(vectors, kMostVectors);
  PlaneChunks p{};
  p.piece = inner;
  p.outer = 1;
  if (inner > elements)
    p.piece = ceil_div(ceil_div(inner, ceil_div(inner, elements)), width) * width;
  else
    p.outer = std::min(outer, std::max<int64_t>(1, elements / inner));
  p.pieces = ceil_div(inner, p.piece);
  p.outer_blocks = ceil_div(outer, p.outer);
  p.count = p.outer_blocks * channels * p.pieces;
  p.by_pieces = divisor(p.pieces);
  p.by_channels = divisor(channels);
  return p;
}

RowChunks cut_rows(int64_t outer, int64_t channels, int64_t inner, int width, bool back_to_back) {
  constexpr int64_t kLanes = 32, kWarps = 8;
  const int64_t row = channels * inner;
  const int64_t warp_columns = kLanes * width;
  RowChunks r{};
  r.join = 1;
  if (back_to_back) {
    // Rows joined into a whole number of vectors, and into few idle lanes: at most one in sixteen.
    const int64_t unit = width / std::gcd(row, static_cast<int64_t>(width));
    const int64_t vectors = row * unit / width;
    int64_t times = std::max<int64_t>(1, kLanes / vectors);
    const auto wasteful = [&] {
      const int64_t all = times * vectors;
      return 16 * (ceil_div(all, kLanes) * kLanes - all) > all;
    };
    const int64_t most = times + kLanes;
    while (times < most && wasteful()) ++times;
    if (wasteful()) times = std::max<int64_t>(1, kLanes / vectors);
    r.join = unit * times;
    if (r.join > outer) r.join = outer >= unit ? outer / unit * unit : outer;
  }
  r.columns = row * r.join;
  r.rows = ceil_div(outer, r.join);
  r.complete_rows = outer / r.join;
  // Few rows: warps stand side by side, so that a thread has several rows in flight.
  int64_t down = std::clamp<int64_t>(floor_power_of_two(std::max<int64_t>(1, r.rows / kFewestRows)), 1, kWarps);
  int64_t across = kWarps / down;
  while (across > 1 && across / 2 * warp_columns >= r.columns) across /= 2;
  down = kWarps / across;
  r.across = static_cast<int>(across);
  r.across_bits = bits(across);
  r.down = static_cast<int>(down);
  r.tile = warp_columns * across;
  r.tile_bits = bits(r.tile);
  r.most_runs = static_cast<int>(inner == 1 ? r.tile : (r.tile - 1) / inner + 2);
  r.tiles = ceil_div(r.columns, r.tile);
  const int64_t wanted = std::max<int64_t>(1, kBlocks / r.tiles);
  const int64_t thread_rows = ceil_div(ceil_div(r.rows, down * wanted), kFewestRows) * kFewestRows;
  r.chunk_rows = down * std::clamp(thread_rows, kFewestRows, kMostRows);
  r.row_chunks = ceil_div(r.rows, r.chunk_rows);
  r.count = r.tiles * r.row_chunks;
  r.by_tiles = divisor(r.tiles);
  r.by_inner = divisor(inner);
  r.by_channels = divisor(channels);
  r.added = r.tiles == 1 ? r.join : 1;
  r.whole = r.tiles == 1 || r.tile % inner == 0;
  r.sums = channels * r.join / r.added + (r.whole ? 0 : r.tiles);
  return r;
}

FinishBlocks cut_finish(int64_t depth, int64_t channels) {
  constexpr int64_t kThreads = 256;
  constexpr int64_t kNeighbours = 4;  // channels in 32 bytes, which are read at once
  FinishBlocks f{};
  f.depth = depth;
  int64_t deep = floor_power_of_two(std::max<int64_t>(1, kThreads / channels));
  if (channels > kThreads || ceil_div(depth, deep) > kAlone) {
    const int64_t most = kThreads / std::min(kNeighbours, ceil_power_of_two(channels));
    deep = std::min(ceil_power_of_two(ceil_div(depth, kShare)), most);
  }
  f.deep = static_cast<int>(deep);
  f.across = static_cast<int>(kThreads / deep);
  f.across_bits = bits(f.across);
  f.blocks = ceil_div(channels, f.across);
  return f;
}

}  // namespace vidfast::cuda
