// The CPU back end's primitives with one variance an element: one walk over all elements, cut into tasks of fixed size.
#include "../heteroscedastic.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>

#include "../channel_math.h"
#include "channels.h"
#include "heteroscedastic_kernels.h"
#include "kernels.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

// Elements of one task: its tensors fit the second-level cache, and there are enough of them for any machine.
constexpr int64_t kTask = 16384;
// Elements that are brought into the type that is computed in, or have weights, at a time: these stay in the
// first-level cache.
constexpr int64_t kStage = 576;
// Shorter rows are gathered, so that vectors run full.
constexpr int64_t kShortRow = 64;
// Tensors that together exceed a core's share of any cache have their gradients written past it.
constexpr int64_t kStreamBytes = int64_t{32} << 20;
// What one thread computes while another wakes up.
constexpr int64_t kAsleep = 50000;

struct Gradients {
  View mean, target, raw;  // data == nullptr: not wanted
};

// Where the row of element e begins, and e's place in it.
struct Place {
  int64_t outer, first;
};

char* at(const View& v, int64_t elements) {
  return v.data == nullptr ? nullptr : static_cast<char*>(v.data) + elements * size_of(v.dtype);
}

// The weights of elements [e, e + n) in the type that is computed in; false where all are 0.
template <class S, class P>
bool spread(const HeteroscedasticProblem& p, int64_t e, int64_t n, S* to) {
  const P* weights = static_cast<const P*>(p.positions);
  const int64_t inner = p.inner, block = p.channels * inner;
  bool any = false;
  for (int64_t done = 0; done < n;) {
    const int64_t number = (e + done) / block, within = (e + done) % block, i = within % inner;
    const int64_t left = n - done;
    int64_t count;
    if (inner == 1) {  // one weight for all channels
      count = std::min(left, block - within);
      std::fill_n(to + done, count, static_cast<S>(weights[number]));
    } else {
      count = std::min(left, inner - i);
      for (int64_t j = 0; j < count; ++j) to[done + j] = static_cast<S>(weights[number * inner + i + j]);
    }
    for (int64_t j = 0; j < count; ++j) any |= to[done + j] != 0;
    done += count;
  }
  return any;
}

template <class S>
bool weights_of(const HeteroscedasticProblem& p, int64_t e, int64_t n, S* to) {
  return p.positions_are_bytes ? spread<S, uint8_t>(p, e, n, to) : spread<S, S>(p, e, n, to);
}

// One call: what all of its tasks share.
struct Walk {
  const HeteroscedasticProblem& p;
  const Gradients& grads;
  ElementConstants constants;
  bool f64, staged, stream;
  ElementPass pass;
  const HeteroscedasticKernels& kernels;

  Place place(int64_t e) const { return {e / p.row, e % p.row}; }

  template <class S>
  double task(int64_t begin, int64_t end) const {
    double sum = 0;
    while (begin < end) {
      const Place here = place(begin);
      int64_t n = end - begin;
      if (!staged) n = std::min(n, p.row - here.first);
      if (staged || p.positions != nullptr) n = std::min(n, kStage);
      sum += staged ? in_stage<S>(begin, here, n) : in_place<S>(begin, here, n);
      begin += n;
    }
    return sum;
  }

  // Elements of one row and one dtype, where they are stored.
  template <class S>
  double in_place(int64_t e, const Place& here, int64_t n) const {
    alignas(64) S weights[kStage];
    const auto where = [&](const View& v) { return at(v, here.outer * v.outer_stride + here.first); };
    Elements job{where(p.mean),       where(p.target),  where(p.raw), where(grads.mean),
                 where(grads.target), where(grads.raw), nullptr,      n};
    if (p.positions != nullptr) {
      if (!weights_of(p, e, n, weights)) {
        for (void* grad : {job.grad_mean, job.grad_target, job.grad_raw})
          if (grad != nullptr) std::memset(grad, 0, n * size_of(p.mean.dtype));
        return 0;
      }
      job.weights = weights;
    }
    const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 64 == 0; };
    return pass(job, constants, stream && aligned(job.grad_mean) && aligned(job.grad_raw));
  }

  // Elements of several rows or dtypes, by way of the type that is computed in.
  template <class S>
  double in_stage(int64_t e, const Place& here, int64_t n) const {
    alignas(64) S mean[kStage], target[kStage], raw[kStage], of_mean[kStage], of_target[kStage], of_raw[kStage];
    alignas(64) S weights[kStage];
    const auto row = [&](const View& v) { return at(v, here.outer * v.outer_stride); };
    const auto walk = [&](const View& v) { return RowWalk{here.first, n, p.row, v.outer_stride}; };
    const auto read = [&](const View& v, S* to) {
      kernels.gather[f64][static_cast<int>(v.dtype)](row(v), walk(v), to);
    };
    Elements job{mean,
                 target,
                 raw,
                 grads.mean.data == nullptr ? nullptr : of_mean,
                 grads.target.data == nullptr ? nullptr : of_target,
                 grads.raw.data == nullptr ? nullptr : of_raw,
                 nullptr,
                 n};
    double sum = 0;
    if (p.positions == nullptr || weights_of(p, e, n, weights)) {
      if (p.positions != nullptr) job.weights = weights;
      read(p.mean, mean);
      read(p.target, target);
      read(p.raw, raw);
      sum = pass(job, constants, false);
    } else {
      for (S* grad : {of_mean, of_target, of_raw}) std::fill_n(grad, n, S(0));
    }
    const auto write = [&](const View& v, const S* from) {
      if (v.data != nullptr) kernels.scatter[f64][static_cast<int>(v.dtype)](from, walk(v), row(v));
    };
    write(grads.mean, of_mean);
    write(grads.target, of_target);
    write(grads.raw, of_raw);
    return sum;
  }
};

// The sum over all elements of w v^beta (log v + r^2 / v + constant), and the gradients for this scale.
double walk(const HeteroscedasticProblem& whole, const Gradients& grads, bool sums, double scale, int threads) {
  HeteroscedasticProblem p = whole;
  const auto back_to_back = [&](const View& v) { return v.data == nullptr || v.outer_stride == p.row; };
  if (back_to_back(p.mean) && back_to_back(p.target) && back_to_back(p.raw) && back_to_back(grads.mean) &&
      back_to_back(grads.target) && back_to_back(grads.raw)) {
    p.row *= p.outer;
    p.outer = 1;
  }
  const DType t = p.mean.dtype;
  const bool f64 = t == DType::f64 || p.target.dtype == DType::f64 || p.raw.dtype == DType::f64;
  const bool staged = p.target.dtype != t || p.raw.dtype != t || (p.row < kShortRow && p.outer > 1);
  const bool gradients = grads.mean.data != nullptr || grads.target.data != nullptr || grads.raw.data != nullptr;
  const int64_t n = p.outer * p.row, tasks = (n + kTask - 1) / kTask;
  const bool in_place = grads.mean.data == p.mean.data || grads.raw.data == p.raw.data;

  const HeteroscedasticKernels& kernels = active_kernels().heteroscedastic();
  const DType computed = f64 ? DType::f64 : DType::f32;
  const ElementPasses& passes = kernels.passes[static_cast<int>(staged ? computed : t)][static_cast<int>(p.transform)];
  const Walk all{p,
                 grads,
                 {p.eps, p.beta, scale, p.full ? kLog2Pi : 0.0, p.negative_is_nan},
                 f64,
                 staged,
                 !in_place && 5 * n * size_of(t) >= kStreamBytes,
                 !gradients ? passes.sum
                 : sums     ? passes.sum_grad
                            : passes.grad,
                 kernels};
  std::unique_ptr<double[]> partial(new double[tasks]);
  parallel_for(tasks, worth_waking(threads, n, kAsleep), [&](int64_t i) {
    const int64_t begin = i * kTask, end = std::min(n, begin + kTask);
    partial[i] = f64 ? all.task<double>(begin, end) : all.task<float>(begin, end);
  });
  double sum = 0;
  for (int64_t i = 0; i < tasks; ++i) sum += partial[i];
  return sum;
}

double k_of(const HeteroscedasticProblem& p) { return p.totals != nullptr ? p.totals[1] : p.k; }

}  // namespace

void heteroscedastic_forward(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, int threads) {
  heteroscedastic_forward_grad(p, loss, loss_dtype, View{}, View{}, threads);
}

void heteroscedastic_forward_grad(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, const View& grad_mean,
                                  const View& grad_raw, int threads) {
  const double k = k_of(p);
  store_scalar(loss, loss_dtype, 0, 0.5 * k * walk(p, {grad_mean, View{}, grad_raw}, true, k, threads));
}

void heteroscedastic_backward(const HeteroscedasticProblem& p, const void* g, DType g_dtype, const View& grad_mean,
                              const View& grad_target, const View& grad_raw, int threads) {
  walk(p, {grad_mean, grad_target, grad_raw}, false, load_scalar(g, g_dtype, 0) * k_of(p), threads);
}

bool vector_function(const char* name, bool f64, const void* from, void* to, int64_t n) {
  const char* const* found =
      std::find_if(std::begin(kFunctions), std::end(kFunctions), [&](const char* f) { return !std::strcmp(f, name); });
  if (found == std::end(kFunctions)) return false;
  active_kernels().heteroscedastic().functions[f64].of[found - kFunctions](from, to, n);
  return true;
}

}  // namespace vidfast::cpu
