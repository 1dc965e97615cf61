// The primitives of the loss with one variance an element: how a problem is cut, its workspace, one sweep each, and
// with sums the finish, which adds those of the sweep's blocks in an order that follows from their number alone.
#include <algorithm>
#include <sstream>

#include "../channel_math.h"
#include "heteroscedastic_args.h"
#include "reduce.h"

namespace vidfast::cuda {
namespace {

// Loads in flight in a thread of the finish.
constexpr int kSumsAtOnce = 8;

__global__ void __launch_bounds__(kThreads) heteroscedastic_finish(const __grid_constant__ HeteroscedasticArgs a) {
  const double k = a.totals == nullptr ? a.k : a.totals[1];
  if (a.overlap) wait_for_previous();
  double sum = 0;
  for (int64_t first = threadIdx.x; first < a.blocks; first += kThreads * kSumsAtOnce) {
    double x[kSumsAtOnce];
#pragma unroll
    for (int u = 0; u < kSumsAtOnce; ++u) {
      const int64_t i = first + u * kThreads;
      x[u] = a.partials[i < a.blocks ? i : first];
    }
#pragma unroll
    for (int u = 0; u < kSumsAtOnce; ++u)
      if (first + u * kThreads < a.blocks) sum += x[u];
  }
  sum = block_sum(reinterpret_cast<double*>(shared_memory()), sum);
  if (threadIdx.x == 0) store_as(a.loss, a.loss_dtype, 0, 0.5 * k * sum);
}

int width_of(DType mean, DType target, DType raw) {
#define VIDFAST_WIDTH(M, T) \
  if (is_of<M>(mean) && is_of<M>(raw) && is_of<T>(target)) return Triple<M, T>::width;
  VIDFAST_CUDA_TRIPLES(VIDFAST_WIDTH)
#undef VIDFAST_WIDTH
  return 1;
}

struct Blocks {
  int batches;
  int64_t count;
};

Blocks cut_elements(int64_t count, int width) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t batches = ceil_div(ceil_div(count, width), kThreads);
  int64_t each = 1;
  while (each < kMostBatches && 2 * each * kBlocksWanted <= batches) each *= 2;
  return {static_cast<int>(each), std::max<int64_t>(1, ceil_div(batches, each))};
}

Strided strided(const View& v, int64_t outer, int64_t row, int width) {
  Strided s{};
  s.data = static_cast<unsigned char*>(v.data);
  s.dtype = v.dtype;
  s.bytes = static_cast<int>(size_of(v.dtype));
  s.gap_bytes = outer == 1 ? 0 : (v.outer_stride - row) * s.bytes;
  // rows that begin between vectors have whole ones only where they follow one another
  const bool whole = s.gap_bytes == 0 || (row % width == 0 && s.gap_bytes % 16 == 0);
  s.vectors = whole && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  return s;
}

Power power_of(double beta) {
  return beta == 0 ? Power::none : beta == 1 ? Power::one : beta == 0.5 ? Power::half : Power::other;
}

HeteroscedasticArgs arguments(const HeteroscedasticProblem& p, const View& grad_mean, const View& grad_target,
                              const View& grad_raw) {
  const int width = width_of(p.mean.dtype, p.target.dtype, p.raw.dtype);
  const auto of = [&](const View& v) { return strided(v, p.outer, p.row, width); };
  HeteroscedasticArgs a{};
  a.mean = of(p.mean);
  a.target = of(p.target);
  a.raw = of(p.raw);
  a.grad_mean = of(grad_mean);
  a.grad_target = of(grad_target);
  a.grad_raw = of(grad_raw);
  a.count = p.outer * p.row;
  a.row = p.row;
  a.joined = true;
  for (const Strided* s : {&a.mean, &a.target, &a.raw, &a.grad_mean, &a.grad_target, &a.grad_raw})
    a.joined = a.joined && (s->data == nullptr || s->gap_bytes == 0);
  a.by_row = divisor(p.row);
  const Blocks blocks = cut_elements(a.count, width);
  a.batches = blocks.batches;
  a.blocks = blocks.count;
  a.transform = p.transform;
  a.power = power_of(p.beta);
  a.wide = {p.eps, p.beta, p.full ? kLog2Pi : 0};
  a.single = {static_cast<float>(a.wide.eps), static_cast<float>(a.wide.beta), static_cast<float>(a.wide.constant)};
  a.k = p.k;
  a.totals = p.totals;
  a.negative_is_nan = p.negative_is_nan;
  if (p.positions == nullptr) return a;
  const bool wide = p.mean.dtype == DType::f64 || p.target.dtype == DType::f64 || p.raw.dtype == DType::f64;
  a.positions = static_cast<const unsigned char*>(p.positions);
  a.position_bytes = p.positions_are_bytes ? 1 : wide ? 8 : 4;
  a.channels = p.channels;
  a.inner = p.channels == 1 ? p.row * p.outer : p.inner;  // a weight for each element
  a.by_channels = divisor(a.channels);
  a.by_inner = divisor(a.inner);
  const int64_t access = a.position_bytes == 1 ? width : 16;
  if (a.channels > 1 && a.inner == 1 && a.channels % width == 0)
    a.access = WeightAccess::one;
  else if ((a.channels == 1 || a.inner % width == 0) && reinterpret_cast<uintptr_t>(p.positions) % access == 0)
    a.access = WeightAccess::vector;
  return a;
}

void launch_sweep(const HeteroscedasticArgs& a, bool sums, Stream stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  a.positions == nullptr ? launch_heteroscedastic(a, sums, on) : launch_masked_heteroscedastic(a, sums, on);
}

void launch_sums(HeteroscedasticArgs& a, void* loss, DType loss_dtype, void* workspace, Stream stream) {
  a.loss = loss;
  a.loss_dtype = loss_dtype;
  a.partials = static_cast<double*>(workspace);
  a.overlap = kOverlap != 0 && can_overlap();
  launch_sweep(a, true, stream);
  launch("heteroscedastic_finish", &heteroscedastic_finish, 1, kWarps * sizeof(double),
         static_cast<cudaStream_t>(stream), a, a.overlap);
}

void describe(std::ostream& out, const char* what, const Strided& s) {
  constexpr const char* names[] = {"f32", "f64", "bf16", "f16"};
  out << ", " << what << "=" << names[static_cast<int>(s.dtype)] << "@" << static_cast<const void*>(s.data) << " gap "
      << s.gap_bytes / s.bytes;
}

}  // namespace

std::string describe(const HeteroscedasticArgs& a) {
  std::ostringstream out;
  out << "elements=" << a.count << ", row=" << a.row << ", transform=" << static_cast<int>(a.transform);
  describe(out, "mean", a.mean);
  describe(out, "target", a.target);
  describe(out, "raw", a.raw);
  describe(out, "grad_mean", a.grad_mean);
  describe(out, "grad_target", a.grad_target);
  describe(out, "grad_raw", a.grad_raw);
  if (a.positions != nullptr)
    out << ", mask=" << a.position_bytes << " bytes@" << static_cast<const void*>(a.positions) << " of " << a.channels
        << " channels, inner " << a.inner;
  if (a.totals != nullptr) out << ", totals@" << static_cast<const void*>(a.totals);
  return out.str();
}

int64_t heteroscedastic_workspace_bytes(int64_t outer, int64_t row, DType mean, DType target, DType raw) {
  return cut_elements(outer * row, width_of(mean, target, raw)).count * static_cast<int64_t>(sizeof(double));
}

void heteroscedastic_forward(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, void* workspace,
                             Stream stream) {
  heteroscedastic_forward_grad(p, loss, loss_dtype, {nullptr, 0, p.mean.dtype}, {nullptr, 0, p.raw.dtype}, workspace,
                               stream);
}

void heteroscedastic_forward_grad(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, const View& grad_mean,
                                  const View& grad_raw, void* workspace, Stream stream) {
  HeteroscedasticArgs a = arguments(p, grad_mean, {nullptr, 0, p.target.dtype}, grad_raw);
  launch_sums(a, loss, loss_dtype, workspace, stream);
}

void heteroscedastic_backward(const HeteroscedasticProblem& p, const void* g, DType g_dtype, const View& grad_mean,
                              const View& grad_target, const View& grad_raw, Stream stream) {
  HeteroscedasticArgs a = arguments(p, grad_mean, grad_target, grad_raw);
  a.g = g;
  a.g_dtype = g_dtype;
  launch_sweep(a, false, stream);
}

}  // namespace vidfast::cuda
