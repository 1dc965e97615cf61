// The kernel of rows: small planes (7x7, 8x8, 14x14, ...) and channel-fastest layouts (channels_last, logits, tokens).
//
// A thread keeps W neighbouring columns and goes down the rows of a chunk, so every access is 128 bits whatever the
// plane's size, each column's scale stays in a register, and sums need no exchange until the chunk's end. There the
// columns' sums (fp32, at most 65 values each; fp64 for fp64) meet in shared memory and are added, in fp64, into
// one sum for each run of a channel's columns. Rows that are not whole aligned vectors (slices at odd offsets) take
// single elements, neighbouring lanes neighbouring columns. Traffic: mean and target once, each gradient once.
#include "reduce.h"

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
template <class M, class T, bool Sum>
struct Columns {
  using P = Pair<M, T>;
  using Acc = typename P::Acc;
  static constexpr int W = P::width;
  static constexpr int U = P::batch;

  const Args& a;
  int64_t tile_begin;  // the tile's first column
  int first, step;     // this thread's columns in the tile: first + e * step
  Acc scale[W] = {}, sum[W] = {};

  __device__ Columns(const Args& args, const Place& place, const Position& at)
      : a(args),
        tile_begin(place.tile_begin),
        first(a.vectors ? (at.x * kWarp + at.lane) * W : at.x * kWarp * W + at.lane),
        step(a.vectors ? 1 : kWarp) {}

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
      vectors(place.begin + y, place.complete, cut.down);
    } else {
      for (int64_t row = place.begin + y; row < place.complete; row += cut.down) edge(row, cut.columns);
    }
    // The last row of joined ones may be incomplete.
    if (place.complete < place.stop && (cut.complete_rows - place.begin) % cut.down == y)
      edge(cut.complete_rows, (a.outer - cut.complete_rows * cut.join) * a.channels * a.inner);
  }

  __device__ void element(int64_t row, int64_t column, int e) {
    const auto offset = [&](const Tensor& t) { return row * a.rows.join * t.stride + column; };
    const Acc r = load_element<Acc, M>(a.mean.at<M>(offset(a.mean)), a.mean.dtype) -
                  load_element<Acc, T>(a.target.at<T>(offset(a.target)), a.target.dtype);
    const Acc gradient = r * scale[e];
    if (Sum) sum[e] += r * r;
    if (a.grad_mean.data != nullptr) store_element<M>(a.grad_mean.at<M>(offset(a.grad_mean)), a.mean.dtype, gradient);
    if (!Sum && a.grad_target.data != nullptr)
      store_element<T>(a.grad_target.at<T>(offset(a.grad_target)), a.target.dtype, -gradient);
  }

  // One row, element by element; it has `limit` columns.
  __device__ void edge(int64_t row, int64_t limit) {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const int64_t column = tile_begin + first + e * step;
      if (column < limit) element(row, column, e);
    }
  }

  // Rows begin, begin + down, ... before stop, as vectors.
  __device__ void vectors(int64_t begin, int64_t stop, int down) {
    const int64_t column = tile_begin + first;
    if (column >= a.rows.columns) return;
    const unsigned char* mean = a.mean.at<M>(column) + begin * a.mean.row_bytes;
    const unsigned char* target = a.target.at<T>(column) + begin * a.target.row_bytes;
    unsigned char *grad_mean = nullptr, *grad_target = nullptr;
    if (a.grad_mean.data != nullptr) grad_mean = a.grad_mean.at<M>(column) + begin * a.grad_mean.row_bytes;
    if (!Sum && a.grad_target.data != nullptr)
      grad_target = a.grad_target.at<T>(column) + begin * a.grad_target.row_bytes;
    // Rows left for this thread: a chunk has few.
    for (int left = static_cast<int>((stop - begin + down - 1) / down); left > 0; left -= U) {
      Vector<M, W> m[U];
      Vector<T, W> t[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (u < left) {
          m[u].load(mean, a.mean.dtype);
          t[u].load(target, a.target.dtype);
        }
        mean += a.mean.step_bytes;
        target += a.target.step_bytes;
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (u >= left) break;
        Acc x[W], y[W];
        m[u].unpack(x);
        t[u].unpack(y);
#pragma unroll
        for (int e = 0; e < W; ++e) {
          x[e] -= y[e];
          if (Sum) sum[e] += x[e] * x[e];
          x[e] *= scale[e];
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
__device__ inline void prefetch_start(const Args& a, const Place& place, const Position& at) {
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
template <class M, class T, bool Sum, class Acc>
__device__ inline void find_scales(const Args& a, const Position& at, Place& place, Acc* scales) {
  Place here;
  here.find(a.rows, a.inner);
  if (threadIdx.x == 0) place = here;
  if (!any_gradient<Sum>(a)) return;
  if (a.prefetch) prefetch_start<M, T>(a, here, at);
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
template <class M, class T, bool Sum, class Acc>
__device__ inline void store_sums(const Args& a, const Place& place, int y, const Columns<M, T, Sum>& columns,
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

template <class M, class T, bool Sum>
__global__ void __launch_bounds__(kThreads, (Pair<M, T>::any ? 2 : 3)) rows(const __grid_constant__ Args a) {
  using Acc = typename Pair<M, T>::Acc;
  Place& place = *reinterpret_cast<Place*>(shared_memory());
  Acc* scales = reinterpret_cast<Acc*>(&place + 1);  // [most_runs]
  Acc* sums = scales + a.rows.most_runs;             // [down, tile]
  const Position at(a.rows);

  begin_sweep<Sum>(a);
  find_scales<M, T, Sum>(a, at, place, scales);
  __syncthreads();

  Columns<M, T, Sum> columns(a, place, at);
  columns.take_scales(place, scales);
  columns.walk(place, at.y);
  store_sums(a, place, at.y, columns, sums);
}

template <class M, class T, bool Sum>
void launch_pair(const Args& a, cudaStream_t stream) {
  using Acc = typename Pair<M, T>::Acc;
  const size_t scales = a.rows.most_runs * sizeof(Acc);
  const size_t sums = Sum ? a.rows.down * a.rows.tile * sizeof(Acc) : 0;
  launch(Sum ? "rows (forward)" : "rows (backward)", &rows<M, T, Sum>, a.rows.count, sizeof(Place) + scales + sums,
         stream, a);
}

}  // namespace

void launch_rows(const Args& a, bool sums, cudaStream_t stream) {
#define VIDFAST_LAUNCH(M, T)                              \
  if (is_of<M>(a.mean.dtype) && is_of<T>(a.target.dtype)) \
    return sums ? launch_pair<M, T, true>(a, stream) : launch_pair<M, T, false>(a, stream);
  VIDFAST_CUDA_PAIRS(VIDFAST_LAUNCH)
#undef VIDFAST_LAUNCH
}

}  // namespace vidfast::cuda
