#include "sweep.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

// Elements of one task: its tensors fit the second-level cache, and there are enough of them for any machine.
constexpr int64_t kTask = 16384;
// Below this many neighbouring elements of one channel, rows of several channels are walked instead of planes.
constexpr int64_t kSmallPlane = 32;
// Rows narrower than this are joined, where they follow one another, so that vectors run full.
constexpr int64_t kNarrowRow = 256;
// Few rows are cut into this many blocks, so that there is work for several threads, but not into thinner ones.
constexpr int64_t kFewestBlocks = 8, kFewestRows = 16;
// Runs of fewer bytes are not written past the caches: their ends are partial lines.
constexpr int64_t kStreamRun = 4096;
// Below this size a second thread costs more than it brings.
constexpr int64_t kSerial = 32768;
// What one thread sweeps while another wakes up.
constexpr int64_t kAsleep = 200000;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class P>
P* at(P* base, DType t, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return base == nullptr ? nullptr : static_cast<Byte*>(base) + elements * size_of(t);
}

// The weights from a position on, where positions have any.
const void* weights_from(const Problem& p, bool f64, int64_t position) {
  if (p.positions == nullptr) return nullptr;
  return static_cast<const char*>(p.positions) + position * (p.positions_are_bytes ? 1 : f64 ? 8 : 4);
}

template <class Job>
void pass(const Passes<Job>& passes, const Sweep& s, const Job& job, bool stream) {
  if (s.sum_sq == nullptr)
    passes.grad(job, stream);
  else if (s.scale != nullptr)
    passes.sum_grad(job, stream);
  else
    passes.sum(job, false);
}

// Neighbouring elements of a channel are walked in runs; a task is some channels of some outer indices, or a
// piece of one plane. Sums are added to sum_sq.
void sweep_planes(const Problem& p, const Sweep& s, const Kernels& kernels, int threads) {
  const bool pieces = p.inner > kTask;
  const int64_t piece = pieces ? kTask : p.inner;
  const int64_t n_pieces = ceil_div(p.inner, piece);
  const int64_t channels_per_task = pieces ? 1 : std::clamp<int64_t>(kTask / p.inner, 1, p.channels);
  const int64_t outer_per_task =
      channels_per_task < p.channels || pieces ? 1 : std::clamp<int64_t>(kTask / (p.channels * p.inner), 1, p.outer);
  const int64_t n_channel_blocks = ceil_div(p.channels, channels_per_task);
  const int64_t n_outer_blocks = ceil_div(p.outer, outer_per_task);

  const bool stream = s.stream && piece * size_of(s.grad_mean.dtype) >= kStreamRun;
  const bool f64 = computes_in_f64(p.mean.dtype, p.target.dtype);
  const Passes<Runs>& passes = kernels.runs[p.positions == nullptr  ? kRunOnes
                                            : p.positions_are_bytes ? kRunBytes
                                                                    : kRunNumbers];

  std::unique_ptr<double[]> partial;  // [outer blocks, C, pieces]
  if (s.sum_sq != nullptr) partial.reset(new double[n_outer_blocks * p.channels * n_pieces]);

  parallel_for(n_outer_blocks * n_channel_blocks * n_pieces, threads, [&](int64_t task) {
    const int64_t i_block = task % n_pieces;
    const int64_t c_block = task / n_pieces % n_channel_blocks;
    const int64_t o_block = task / n_pieces / n_channel_blocks;
    const int64_t i = i_block * piece;
    const int64_t c_begin = c_block * channels_per_task;
    const int64_t c_end = std::min(p.channels, c_begin + channels_per_task);
    const int64_t o_begin = o_block * outer_per_task;
    const int64_t o_end = std::min(p.outer, o_begin + outer_per_task);
    for (int64_t o = o_begin; o < o_end; ++o) {
      const int64_t offset = c_begin * p.inner + i;
      const auto where = [&](const View& v) { return at(v.data, v.dtype, o * v.outer_stride + offset); };
      Runs runs;
      runs.mean = where(p.mean);
      runs.target = where(p.target);
      runs.grad_mean = where(s.grad_mean);
      runs.grad_target = where(s.grad_target);
      runs.n = std::min(piece, p.inner - i);
      runs.channels = c_end - c_begin;
      runs.scale = s.scale != nullptr ? s.scale + c_begin : nullptr;
      runs.sum_sq = partial ? &partial[(o_block * p.channels + c_begin) * n_pieces + i_block] : nullptr;
      runs.add = o > o_begin;
      runs.weights = weights_from(p, f64, o * p.inner + i);
      pass(passes, s, runs, stream);
    }
  });

  if (s.sum_sq == nullptr) return;
  for (int64_t o = 0; o < n_outer_blocks; ++o)
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t i = 0; i < n_pieces; ++i) s.sum_sq[c] += partial[(o * p.channels + c) * n_pieces + i];
}

// Rows of columns, column j belonging to channel (j / inner) % C. Rows [begin, end) are taken `join` at a time
// as one wider row. Sums are added to sum_sq.
void sweep_rows(const Problem& p, const Sweep& s, const Kernels& kernels, int64_t begin, int64_t end, int64_t join,
                int threads) {
  const int64_t width = p.channels * p.inner;
  const int64_t columns = width * join;
  const int64_t rows = (end - begin) / join;
  if (rows == 0) return;
  const int64_t n_tiles = ceil_div(columns, kTileColumns);
  // Tiles begin at multiples of 16 columns, so that an aligned row has aligned tiles.
  const int64_t tile_columns = std::min(kTileColumns, ceil_div(ceil_div(columns, n_tiles), 16) * 16);
  const int64_t n_column_blocks = ceil_div(columns, tile_columns);
  const int64_t most_rows = std::max<int64_t>(kRun, kTask / tile_columns / kRun * kRun);
  const int64_t tile_rows = std::clamp<int64_t>(ceil_div(rows, kFewestBlocks), kFewestRows, most_rows);
  const int64_t n_row_blocks = ceil_div(rows, tile_rows);

  const bool f64 = computes_in_f64(p.mean.dtype, p.target.dtype);
  std::unique_ptr<double[]> partial;  // [row blocks, columns]
  if (s.sum_sq != nullptr) partial.reset(new double[n_row_blocks * columns]);
  std::unique_ptr<char[]> scale;  // [columns], in the compute type
  if (s.scale != nullptr) {
    scale.reset(new char[columns * (f64 ? 8 : 4)]);
    for (int64_t j = 0; j < columns; ++j) {
      const double value = s.scale[j / p.inner % p.channels];
      if (f64)
        reinterpret_cast<double*>(scale.get())[j] = value;
      else
        reinterpret_cast<float*>(scale.get())[j] = static_cast<float>(value);
    }
  }
  const auto stride = [&](const View& v) { return v.outer_stride * join; };
  const bool stream =
      s.stream &&
      reinterpret_cast<uintptr_t>(at(s.grad_mean.data, s.grad_mean.dtype, begin * s.grad_mean.outer_stride)) % 64 ==
          0 &&
      (rows == 1 || stride(s.grad_mean) * size_of(s.grad_mean.dtype) % 64 == 0);
  const int64_t row_positions = join * p.inner;
  const Passes<Tile>& passes = kernels.tiles[p.positions == nullptr ? kTileOnes
                                             : row_positions == 1   ? kTileByRow
                                                                    : kTileByColumn];

  parallel_for(n_row_blocks * n_column_blocks, threads, [&](int64_t task) {
    const int64_t j = task % n_column_blocks * tile_columns;
    const int64_t row = task / n_column_blocks * tile_rows;
    const auto where = [&](const View& v) { return at(v.data, v.dtype, (begin + row * join) * v.outer_stride + j); };
    Tile tile;
    tile.mean = where(p.mean);
    tile.target = where(p.target);
    tile.grad_mean = where(s.grad_mean);
    tile.grad_target = where(s.grad_target);
    tile.mean_stride = stride(p.mean);
    tile.target_stride = stride(p.target);
    tile.grad_mean_stride = stride(s.grad_mean);
    tile.grad_target_stride = stride(s.grad_target);
    tile.rows = std::min(tile_rows, rows - row);
    tile.columns = std::min(tile_columns, columns - j);
    tile.scale = scale ? scale.get() + j * (f64 ? 8 : 4) : nullptr;
    tile.sum_sq = partial ? &partial[task / n_column_blocks * columns + j] : nullptr;
    tile.weights = weights_from(p, f64, begin * p.inner + row * row_positions);
    tile.weights_are_bytes = p.positions_are_bytes;
    tile.row_positions = row_positions;
    tile.channels = p.channels;
    tile.inner = p.inner;
    tile.first = j;
    pass(passes, s, tile, stream);
  });

  if (s.sum_sq == nullptr) return;
  for (int64_t b = 1; b < n_row_blocks; ++b)
    for (int64_t j = 0; j < columns; ++j) partial[j] += partial[b * columns + j];
  for (int64_t join_row = 0, j = 0; join_row < join; ++join_row)
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t i = 0; i < p.inner; ++i, ++j) s.sum_sq[c] += partial[j];
}

}  // namespace

void sweep(const Problem& whole, const Sweep& s, int threads) {
  Problem p = whole;
  const auto back_to_back = [&](const View& v) {
    return v.data == nullptr || v.outer_stride == p.channels * p.inner || p.outer == 1;
  };
  const bool contiguous =
      back_to_back(p.mean) && back_to_back(p.target) && back_to_back(s.grad_mean) && back_to_back(s.grad_target);
  if (p.channels == 1 && contiguous) {
    p.inner *= p.outer;
    p.outer = 1;
  }
  const int64_t elements = p.outer * p.channels * p.inner;
  threads = elements < kSerial ? 1 : worth_waking(threads, elements, kAsleep);
  const Kernels& kernels = active_kernels().pair[static_cast<int>(p.mean.dtype)][static_cast<int>(p.target.dtype)];
  if (s.sum_sq != nullptr) std::fill_n(s.sum_sq, p.channels, 0.0);
  if (p.inner >= kSmallPlane || p.channels == 1) {
    sweep_planes(p, s, kernels, threads);
    return;
  }
  const int64_t width = p.channels * p.inner;
  int64_t join = 1;
  if (contiguous && width < kNarrowRow) {
    // Multiples of 16 columns keep joined rows aligned. No more than there are rows.
    const int64_t step = 16 / std::gcd<int64_t>(16, width);
    join = step * ceil_div(kNarrowRow, step * width);
    if (join > p.outer) join = p.outer;
  }
  const int64_t joined = p.outer / join * join;
  sweep_rows(p, s, kernels, 0, joined, join, threads);
  sweep_rows(p, s, kernels, joined, p.outer, 1, threads);
}

}  // namespace vidfast::cpu
