// The CUDA back end's primitives: which mapping a problem takes, its workspace, one launch each.
#include <algorithm>
#include <sstream>

#include "../gaussian_nll.h"
#include "args.h"
#include "scale.h"

namespace vidfast::cuda {
namespace {

Tensor tensor(const View& v) {
  return {static_cast<unsigned char*>(v.data), v.outer_stride, v.dtype, static_cast<int>(size_of(v.dtype)), 0, 0};
}

// The problem as one of the two mappings walks it.
struct Plan {
  bool planes;
  int64_t outer, channels, inner;
  PlaneChunks plane_chunks;
  RowChunks row_chunks;

  FinishBlocks blocks;

  // The workspace: a counter, the losses of the finish's blocks, partial sums.
  static constexpr int64_t counter_bytes = 16;
  int64_t partials() const { return planes ? blocks.depth * channels : row_chunks.row_chunks * row_chunks.sums; }
  int64_t bytes() const { return counter_bytes + 8 * (blocks.blocks + partials()); }
};

Plan plan(int64_t outer, int64_t channels, int64_t inner, DType mean, DType target, bool back_to_back) {
  const int width = width_of(mean, target);
  if (channels == 1 && back_to_back) {
    inner *= outer;
    outer = 1;
  }
  Plan p{};
  p.planes = inner >= kPlane || (channels == 1 && back_to_back);
  p.outer = outer;
  p.channels = channels;
  p.inner = inner;
  if (p.planes)
    p.plane_chunks = cut_planes(outer, channels, inner, width);
  else
    p.row_chunks = cut_rows(outer, channels, inner, width, back_to_back);
  const PlaneChunks& planes = p.plane_chunks;
  const RowChunks& rows = p.row_chunks;
  p.blocks =
      cut_finish(p.planes ? planes.outer_blocks * planes.pieces : rows.row_chunks * rows.join / rows.added, channels);
  return p;
}

bool back_to_back(int64_t outer, int64_t row, int64_t mean_stride, int64_t target_stride) {
  return outer == 1 || (mean_stride == row && target_stride == row);
}

// Whether all rows of a tensor are whole vectors of `width` elements on 16-byte addresses.
bool whole_vectors(const Tensor& t, const RowChunks& rows, int width) {
  if (t.data == nullptr) return true;
  return rows.columns % width == 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (rows.rows == 1 || t.row_bytes % 16 == 0);
}

Args arguments(const Problem& p, const Plan& plan, const View& grad_mean, const View& grad_target) {
  Args a{};
  a.mean = tensor(p.mean);
  a.target = tensor(p.target);
  a.grad_mean = tensor(grad_mean);
  a.grad_target = tensor(grad_target);
  a.outer = plan.outer;
  a.channels = plan.channels;
  a.inner = plan.inner;
  a.alpha = p.alpha;
  a.alpha_dtype = p.alpha_dtype;
  a.alpha_bytes = p.channels * size_of(p.alpha_dtype);
  a.eps = p.eps;
  a.k = p.k;
  a.m = static_cast<double>(p.outer) * static_cast<double>(p.inner);
  a.full = p.full;
  a.positions = static_cast<const unsigned char*>(p.positions);
  const bool wide = p.mean.dtype == DType::f64 || p.target.dtype == DType::f64;
  a.position_bytes = p.positions_are_bytes ? 1 : wide ? 8 : 4;
  a.totals = p.totals;
  a.prefetch = kPrefetch != 0;
  a.planes = plan.plane_chunks;
  a.rows = plan.row_chunks;
  a.blocks = plan.blocks;
  if (plan.planes) {
    for (Tensor* t : {&a.mean, &a.target, &a.grad_mean, &a.grad_target}) t->step_bytes = t->stride * t->bytes;
  } else {
    const int width = width_of(p.mean.dtype, p.target.dtype);
    a.vectors = true;
    for (Tensor* t : {&a.mean, &a.target, &a.grad_mean, &a.grad_target}) {
      t->row_bytes = plan.row_chunks.join * t->stride * t->bytes;
      t->step_bytes = plan.row_chunks.down * t->row_bytes;
      a.vectors = a.vectors && whole_vectors(*t, plan.row_chunks, width);
    }
    a.one_position = plan.inner == 1 && (plan.row_chunks.join == 1 || (a.vectors && plan.channels % width == 0));
    if (plan.row_chunks.join > 1 && plan.outer > 1)
      for (const Tensor* t : {&a.grad_mean, &a.grad_target})
        if (t->data != nullptr && t->stride != p.channels * p.inner)
          throw std::runtime_error("CUDA: gradients must be dense where mean and target are: " + describe(a));
  }
  return a;
}

void launch_sweep(const Args& a, bool planes, bool sums, cudaStream_t stream) {
  if (planes)
    a.positions == nullptr ? launch_planes(a, sums, stream) : launch_masked_planes(a, sums, stream);
  else
    a.positions == nullptr ? launch_rows(a, sums, stream) : launch_masked_rows(a, sums, stream);
}

void launch_sums(Args& a, const Plan& plan, void* loss, DType loss_dtype, void* workspace, cudaStream_t stream) {
  a.loss = loss;
  a.loss_dtype = loss_dtype;
  unsigned char* at = static_cast<unsigned char*>(workspace);
  a.counter = reinterpret_cast<unsigned*>(at);
  a.losses = reinterpret_cast<double*>(at + plan.counter_bytes);
  a.partials = a.losses + plan.blocks.blocks;
  a.overlap = kOverlap != 0 && can_overlap();
  launch_sweep(a, plan.planes, true, stream);
  launch_finish(a, stream);
}

Plan plan_of(const Problem& p) {
  const bool dense = back_to_back(p.outer, p.channels * p.inner, p.mean.outer_stride, p.target.outer_stride);
  return plan(p.outer, p.channels, p.inner, p.mean.dtype, p.target.dtype, dense);
}

const char* name(DType t) {
  constexpr const char* names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(t)];
}

void describe(std::ostream& out, const char* what, const Tensor& t) {
  out << ", " << what << "=" << name(t.dtype) << "@" << static_cast<const void*>(t.data) << " stride " << t.stride;
}

}  // namespace

std::string describe(const Args& a) {
  std::ostringstream out;
  out << "outer=" << a.outer << ", C=" << a.channels << ", inner=" << a.inner;
  describe(out, "mean", a.mean);
  describe(out, "target", a.target);
  describe(out, "grad_mean", a.grad_mean);
  describe(out, "grad_target", a.grad_target);
  if (a.positions != nullptr) {
    const char* kind = a.position_bytes == 1 ? "u8" : name(a.position_bytes == 4 ? DType::f32 : DType::f64);
    out << ", mask=" << kind << "@" << static_cast<const void*>(a.positions);
  }
  if (a.totals != nullptr) out << ", totals@" << static_cast<const void*>(a.totals);
  return out.str();
}

std::string describe(const ScaleArgs& a) {
  std::ostringstream out;
  out << "outer=" << a.outer << ", row=" << a.row << ", C=" << a.channels;
  describe(out, "source", a.source);
  describe(out, "result", a.result);
  return out.str();
}

int64_t workspace_bytes(int64_t outer, int64_t channels, int64_t inner, int64_t mean_stride, int64_t target_stride,
                        DType mean, DType target) {
  return plan(outer, channels, inner, mean, target, back_to_back(outer, channels * inner, mean_stride, target_stride))
      .bytes();
}

void forward(const Problem& p, void* loss, DType loss_dtype, double* sum_sq, void* workspace, Stream stream) {
  const Plan how = plan_of(p);
  Args a = arguments(p, how, View{nullptr, 0, p.mean.dtype}, View{nullptr, 0, p.target.dtype});
  a.sum_sq = sum_sq;
  launch_sums(a, how, loss, loss_dtype, workspace, static_cast<cudaStream_t>(stream));
}

void forward_grad(const Problem& p, void* loss, DType loss_dtype, const View& grad_mean, double* grad_alpha,
                  void* workspace, Stream stream) {
  const Plan how = plan_of(p);
  Args a = arguments(p, how, grad_mean, View{nullptr, 0, p.target.dtype});
  a.grad_alpha = grad_alpha;
  launch_sums(a, how, loss, loss_dtype, workspace, static_cast<cudaStream_t>(stream));
}

void backward(const Problem& p, const void* g, DType g_dtype, const double* sum_sq, const View& grad_mean,
              const View& grad_target, void* grad_alpha, Stream stream) {
  const Plan how = plan_of(p);
  Args a = arguments(p, how, grad_mean, grad_target);
  a.g = g;
  a.g_dtype = g_dtype;
  a.saved_sum_sq = sum_sq;
  a.grad_alpha_out = grad_alpha;
  if (grad_mean.data == nullptr && grad_target.data == nullptr)
    launch_alpha(a, static_cast<cudaStream_t>(stream));
  else
    launch_sweep(a, how.planes, false, static_cast<cudaStream_t>(stream));
}

void scale(const void* g, DType g_dtype, int64_t outer, int64_t row, const View& source, const View& result,
           int64_t channels, const double* grad_alpha, void* grad_alpha_out, DType alpha_dtype, Stream stream) {
  ScaleArgs a{};
  a.g = g;
  a.g_dtype = g_dtype;
  a.source = tensor(source);
  a.result = tensor(result);
  if (source.outer_stride == row && result.outer_stride == row) {
    row *= outer;
    outer = 1;
  }
  a.outer = outer;
  a.row = row;
  const int64_t width = 16 / size_of(source.dtype);
  a.piece = width * warp_vectors(outer * row / width, 512);
  a.pieces = (row + a.piece - 1) / a.piece;
  a.by_pieces = divisor(std::max<int64_t>(a.pieces, 1));  // no rows where d/d alpha alone is scaled
  a.channels = grad_alpha == nullptr ? 0 : channels;
  a.grad_alpha = grad_alpha;
  a.grad_alpha_out = grad_alpha_out;
  a.alpha_dtype = alpha_dtype;
  launch_scale(a, static_cast<cudaStream_t>(stream));
}

}  // namespace vidfast::cuda
