// The kernel of rows: small planes (7x7, 8x8, 14x14, ...) and channel-fastest layouts (channels_last, logits, tokens).
//
// A thread keeps W neighbouring columns and goes down the rows of a chunk, so every access is 128 bits whatever the
// plane's size, each column's scale stays in a register, and sums need no exchange until the chunk's end. There the
// columns' sums (fp32, at most 65 values each; fp64 for fp64) meet in shared memory and are added, in fp64, into
// one sum for each run of a channel's columns. Rows that are not whole aligned vectors (slices at odd offsets) take
// single elements, neighbouring lanes neighbouring columns. Traffic: mean and target once, each gradient once.
//
// Masked: there is a weight for each position. Where the channel is fastest a thread's columns are mostly of one
// position and have one weight a row, else each has its own. The weights of a batch of rows are loaded first, and where
// a thread's are all 0 in a row nothing else of it is: tokens of padding cost a weight and the zeros that are stored.
#pragma once

#include "reduce.h"
#include "weights.h"

namespace vidfast::cuda {
namespace {

// Where a block is. It is kept in shared memory: registers are for the vectors.
struct Place {
  int64_t tile, tile_begin;                  // the tile, its first column
  int64_t row_chunk, begin, complete, stop;  // the chunk's rows, those of them that are complete
  int64_t first_run;                         // the run of the tile's first column
  int phase;                                 // that run's columns before the tile
  int columns, runs;                         // of the tile

  __device__ void find(const RowChunks& cut, int64_t inner) {
    row_chunk = quotient(blockIdx.x, cut.by_tiles);
    tile = blockIdx.x - row_chunk * cut.tiles;
    tile_begin = tile * cut.tile;
    begin = row_chunk * cut.chunk_rows;
    stop = begin + cut.chunk_rows < cut.rows ? begin + cut.chunk_rows : cut.rows;
    complete = stop < cut.complete_rows ? stop : cut.complete_rows;
    first_run = quotient(tile_begin, cut.by_inner);
    phase = static_cast<int>(tile_begin - first_run * inner);
    columns = static_cast<int>(cut.columns - tile_begin < cut.tile ? cut.columns - tile_begin : cut.tile);
    runs = static_cast<int>(quotient(phase + columns - 1, cut.by_inner)) + 1;
  }
};

// Where a thread is in its block, whose warps stand `across` by `down`.
struct Position {
  int lane, x, y;

  __device__ explicit Position(const RowChunks& cut)
      : lane(threadIdx.x % kWarp),
        x((threadIdx.x / kWarp) & (cut.across - 1)),
        y((threadIdx.x / kWarp) >> cut.across_bits) {}
};

// One thread's columns of a chunk.
template <class M, class T, bool Sum, bool Masked>
struct Columns {
  using P = Pair<M, T>;
  using Acc = typename P::Acc;
  static constexpr int W = P::width;
  static constexpr int U = P::batch;

  const Args& a;
  int64_t tile_begin;  // the tile's first column
  int first, step;     // this thread's columns in the tile: first + e * step
  Acc scale[W] = {}, sum[W] = {};
  int position[W];  // Masked: of each column, in its row; where they are of one position the first alone

  __device__ Columns(const Args& args, const Place& place, const Position& at)
      : a(args),
        tile_begin(place.tile_begin),
        first(a.vectors ? (at.x * kWarp + at.lane) * W : at.x * kWarp * W + at.lane),
        step(a.vectors ? 1 : kWarp) {
    if constexpr (Masked) {
      position[0] = position_of(first);
#pragma unroll
      for (int e = 1; e < W; ++e) position[e] = a.one_position ? 0 : position_of(first + e * step);
    }
  }

  // Of a column of the tile, in the joined rows: they have `inner` positions each.
  __device__ int position_of(int column) const {
    const int64_t run = quotient(tile_begin + column, a.rows.by_inner);
    const int64_t in_run = tile_begin + column - run * a.inner;
    return static_cast<int>(quotient(run, a.rows.by_channels) * a.inner + in_run);
  }
  __device__ int64_t row_positions() const { return a.rows.join * a.inner; }
  __device__ Weights<Acc, P::any> weights() const { return {a.positions, a.position_bytes}; }

  // `scales`: one for each of the tile's runs.
  __device__ void take_scales(const Place& place, const Acc* scales) {
    if (!any_gradient<Sum>(a)) return;
    const int inner = static_cast<int>(a.inner);
    int run = static_cast<int>(quotient(place.phase + first, a.rows.by_inner));
    int in_run = place.phase + first - run * inner;
#pragma unroll
    for (int e = 0; e < W; ++e) {
      if (first + e * step < place.columns) scale[e] = scales[run];
      in_run += step;
      if (in_run >= inner) {
        const int over = step == 1 ? 1 : static_cast<int>(quotient(in_run, a.rows.by_inner));
        run += over;
        in_run -= over * inner;
      }
    }
  }

  // The chunk's rows y, y + down, ...
  __device__ void walk(const Place& place, int y) {
    const RowChunks& cut = a.rows;
    if (a.vectors) {
      const int64_t begin = place.begin + y;
      if (Masked && a.one_position)
        vectors<1>(begin, place.complete, cut.down);
      else
        vectors<W>(begin, place.complete, cut.down);
    } else {
      for (int64_t row = place.begin + y; row < place.complete; row += cut.down) edge(row, cut.columns);
    }
    // The last row of joined ones may be incomplete.
    if (place.complete < place.stop && (cut.complete_rows - place.begin) % cut.down == y)
      edge(cut.complete_rows, (a.outer - cut.complete_rows * cut.join) * a.channels * a.inner);
  }

  __device__ void element(int64_t row, int64_t column, Acc w, int e) {
    const auto offset = [&](const Tensor& t) { return row * a.rows.join * t.stride + column; };
    Acc gradient = 0;
    if (!Masked || w != 0)
      gradient = gradient_of<Sum, Masked>(load_element<Acc, M>(a.mean.at<M>(offset(a.mean)), a.mean.dtype),
                                          load_element<Acc, T>(a.target.at<T>(offset(a.target)), a.target.dtype), w,
                                          scale[e], sum[e]);
    if (a.grad_mean.data != nullptr) store_element<M>(a.grad_mean.at<M>(offset(a.grad_mean)), a.mean.dtype, gradient);
    if (!Sum && a.grad_target.data != nullptr)
      store_element<T>(a.grad_target.at<T>(offset(a.grad_target)), a.target.dtype, -gradient);
  }

  // One row, element by element; it has `limit` columns.
  __device__ void edge(int64_t row, int64_t limit) {
    const auto column = [&](int e) { return tile_begin + first + e * step; };
    Acc w[W] = {};
    if constexpr (Masked)
      weights().load(w, [&](int e) {
        return column(e) < limit ? row * row_positions() + (a.one_position ? position[0] : position[e]) : -1;
      });
#pragma unroll
    for (int e = 0; e < W; ++e)
      if (column(e) < limit) element(row, column(e), w[e], e);
  }

  // Rows in flight, with so many weights each: not more than registers have room for.
  template <int Each>
  static constexpr int batch = Masked && U * Each > 16 ? 16 / Each : U;

  // Masked: of rows begin, begin + down, ..., `left` of them, the weights of each; one a row, or one a column.
  template <int B, int Each>
  __device__ void load_weights(Acc (&w)[B][Each], int64_t begin, int down, int left) const {
    Acc flat[B * Each];
    const int64_t at = begin * row_positions(), step = down * row_positions();
    weights().load(flat, [&](int j) { return j / Each < left ? at + j / Each * step + position[j % Each] : -1; });
#pragma unroll
    for (int j = 0; j < B * Each; ++j) w[j / Each][j % Each] = flat[j];
  }

  // Masked, and one weight a row: asks for this thread's vectors in its first batch of rows, where they count.
  __device__ void prefetch_start(const Place& place, int y) const {
    if (!a.vectors || !a.one_position || first >= place.columns) return;
    const int down = a.rows.down;
    const int64_t begin = place.begin + y;
    int left = 0;  // counted: a division takes long
#pragma unroll
    for (int u = 0; u < U; ++u) left += begin + u * down < place.complete;
    Acc w[U][1];
    load_weights(w, begin, down, left);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!any(w[u])) continue;
      prefetch(a.mean.at<M>(tile_begin + first) + (begin + u * down) * a.mean.row_bytes);
      prefetch(a.target.at<T>(tile_begin + first) + (begin + u * down) * a.target.row_bytes);
    }
  }

  // Rows begin, begin + down, ... before stop, as vectors. Masked: with so many weights each, 1 or W.
  template <int Each>
  __device__ void vectors(int64_t begin, int64_t stop, int down) {
    const int64_t column = tile_begin + first;
    if (column >= a.rows.columns) return;
    const unsigned char* mean = a.mean.at<M>(column) + begin * a.mean.row_bytes;
    const unsigned char* target = a.target.at<T>(column) + begin * a.target.row_bytes;
    unsigned char *grad_mean = nullptr, *grad_target = nullptr;
    if (a.grad_mean.data != nullptr) grad_mean = a.grad_mean.at<M>(column) + begin * a.grad_mean.row_bytes;
    if (!Sum && a.grad_target.data != nullptr)
      grad_target = a.grad_target.at<T>(column) + begin * a.grad_target.row_bytes;
    constexpr int B = batch<Each>;
    // Rows left for this thread: a chunk has few.
    for (int left = static_cast<int>((stop - begin + down - 1) / down); left > 0; left -= B) {
      Vector<M, W> m[B];
      Vector<T, W> t[B];
      Acc w[B][Each] = {};
      if constexpr (Masked) {
        load_weights(w, begin, down, left);
        begin += B * down;
      }
#pragma unroll
      for (int u = 0; u < B; ++u) {
        if (Masked ? any(w[u]) : u < left) {
          m[u].load(mean, a.mean.dtype);
          t[u].load(target, a.target.dtype);
        }
        mean += a.mean.step_bytes;
        target += a.target.step_bytes;
      }
#pragma unroll
      for (int u = 0; u < B; ++u) {
        if (u >= left) break;
        Acc x[W] = {}, y[W];
        if (!Masked || any(w[u])) {
          m[u].unpack(x);
          t[u].unpack(y);
#pragma unroll
          for (int e = 0; e < W; ++e) x[e] = gradient_of<Sum, Masked>(x[e], y[e], w[u][e % Each], scale[e], sum[e]);
        }
        if (a.grad_mean.data != nullptr) {
          store_vector<M>(grad_mean, a.mean.dtype, x, Acc(1));
          grad_mean += a.grad_mean.step_bytes;
        }
        if (!Sum && a.grad_target.data != nullptr) {
          store_vector<T>(grad_target, a.target.dtype, x, Acc(-1));
          grad_target += a.grad_target.step_bytes;
        }
      }
    }
  }
};

// Lines of a warp's first batch of rows.
template <class M, class T>
__device__ inline void prefetch_lines(const Args& a, const Place& place, const Position& at) {
  constexpr int W = Pair<M, T>::width;
  if constexpr (!Pair<M, T>::any) {
    const int down = a.rows.down;
    const auto line = [&](const Tensor& t, int u, int i, int bytes) -> const unsigned char* {
      const int column = at.x * kWarp * W + i * 128 / bytes;
      const int64_t row = place.begin + at.y + u * down;
      if (column >= place.columns || row >= place.complete) return nullptr;
      return t.data + row * t.row_bytes + (place.tile_begin + column) * bytes;
    };
    prefetch_batch<M, T>(
        at.lane, [&](int u, int i) { return line(a.mean, u, i, sizeof(M)); },
        [&](int u, int i) { return line(a.target, u, i, sizeof(T)); });
  }
}

// The block's place, and where a gradient is wanted the scales of its tile's runs, both into shared memory. Called by
// all threads; what they find is there after a barrier. Backward: writes d/d alpha.
template <class M, class T, bool Sum, bool Masked, class Acc>
__device__ inline void find_scales(const Args& a, const Position& at, Place& place, Acc* scales) {
  Place here;
  here.find(a.rows, a.inner);
  if (threadIdx.x == 0) place = here;
  if (!any_gradient<Sum>(a)) return;
  if (a.prefetch) {
    if constexpr (Masked)
      Columns<M, T, Sum, Masked>(a, here, at).prefetch_start(here, at.y);
    else
      prefetch_lines<M, T>(a, here, at);
  }
  for (int i = threadIdx.x; i < here.runs; i += kThreads) {
    const int64_t run = here.first_run + i;
    const Scale<Sum> scale(a, run - quotient(run, a.rows.by_channels) * a.channels);
    scales[i] = static_cast<Acc>(scale.value());
    // A channel is met first where its first run begins.
    if (!Sum && here.row_chunk == 0 && run < a.channels && (i > 0 || here.phase == 0))
      write_grad_alpha(a, run, scale.gk());
  }
}

// sums [down, tile] of the columns -> one sum for each of `runs` runs, the first of which begins `phase` columns before
// the tile; to each of them is `added` what is `runs` runs further on, so many times less one. Called by all threads.
template <class Acc>
__device__ inline void add_columns(const Acc* sums, int tile, int down, int columns, int runs, int added, int phase,
                                   int64_t inner, double* out) {
  int lanes = 1;
  while (lanes < kWarp && lanes < inner && 2 * lanes * runs <= kThreads) lanes *= 2;
  const int abreast = kThreads / lanes;
  const int lane = threadIdx.x % lanes;
  for (int first = 0; first < runs; first += abreast) {  // all threads go round equally often: they shuffle
    const int run = first + threadIdx.x / lanes;
    double s = 0;
    for (int more = run < runs ? 0 : added; more < added; ++more) {
      const int64_t start = (run + more * runs) * inner - phase;
      const int begin = start > 0 ? static_cast<int>(start) : 0;
      const int end = start + inner < columns ? static_cast<int>(start + inner) : columns;
      for (int j = begin + lane; j < end; j += lanes)
        for (int d = 0; d < down; ++d) s += static_cast<double>(sums[d * tile + j]);
    }
    for (int d = lanes / 2; d > 0; d /= 2) s += __shfl_xor_sync(kAllLanes, s, d);
    if (lane == 0 && run < runs) out[run] = s;
  }
}

// Forward: the threads' sums meet in `sums`, and become the chunk's partial sums. Called by all threads.
template <class M, class T, bool Sum, bool Masked, class Acc>
__device__ inline void store_sums(const Args& a, const Place& place, int y, const Columns<M, T, Sum, Masked>& columns,
                                  Acc* sums) {
  if constexpr (Sum) {
    const RowChunks& cut = a.rows;
    const int tile = static_cast<int>(cut.tile);
#pragma unroll
    for (int e = 0; e < columns.W; ++e) sums[y * tile + columns.first + e * columns.step] = columns.sum[e];
    __syncthreads();
    const int64_t number = place.first_run + (cut.whole ? 0 : place.tile);
    const int added = static_cast<int>(cut.added);
    add_columns(sums, tile, cut.down, place.columns, place.runs / added, added, place.phase, a.inner,
                a.partials + place.row_chunk * cut.sums + number);
  }
}

template <class M, class T, bool Sum, bool Masked>
__global__ void __launch_bounds__(kThreads, (Pair<M, T>::any || Masked ? 2 : 3)) rows(const __grid_constant__ Args a) {
  using Acc = typename Pair<M, T>::Acc;
  Place& place = *reinterpret_cast<Place*>(shared_memory());
  Acc* scales = reinterpret_cast<Acc*>(&place + 1);  // [most_runs]
  Acc* sums = scales + a.rows.most_runs;             // [down, tile]
  const Position at(a.rows);

  begin_sweep<Sum>(a);
  find_scales<M, T, Sum, Masked>(a, at, place, scales);
  __syncthreads();

  Columns<M, T, Sum, Masked> columns(a, place, at);
  columns.take_scales(place, scales);
  columns.walk(place, at.y);
  store_sums(a, place, at.y, columns, sums);
}

template <class M, class T, bool Sum, bool Masked>
void launch_pair(const Args& a, cudaStream_t stream) {
  using Acc = typename Pair<M, T>::Acc;
  const size_t scales = a.rows.most_runs * sizeof(Acc);
  const size_t sums = Sum ? a.rows.down * a.rows.tile * sizeof(Acc) : 0;
  launch(Sum ? "rows (forward)" : "rows (backward)", &rows<M, T, Sum, Masked>, a.rows.count,
         sizeof(Place) + scales + sums, stream, a);
}

template <bool Masked>
void launch_rows_of(const Args& a, bool sums, cudaStream_t stream) {
#define VIDFAST_LAUNCH(M, T)                              \
  if (is_of<M>(a.mean.dtype) && is_of<T>(a.target.dtype)) \
    return sums ? launch_pair<M, T, true, Masked>(a, stream) : launch_pair<M, T, false, Masked>(a, stream);
  VIDFAST_CUDA_PAIRS(VIDFAST_LAUNCH)
#undef VIDFAST_LAUNCH
}

}  // namespace
}  // namespace vidfast::cuda
