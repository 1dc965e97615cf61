// The kernel of the loss with one variance an element.
//
// A thread takes W neighbouring elements, numbered over all rows, so that which thread adds what, and when, follows
// from the shape and dtypes alone. A tensor whose elements e to e + W - 1 are whole 128-bit words is accessed by those,
// any other element by element: rows of odd lengths, misaligned slices, the last few elements. The three loads of the
// next W elements are under way while W are computed, which takes long: an exponential, one or two logarithms and a
// division each. The terms of W elements are added in fp32 (fp64 for fp64), those sums in fp64, a block's are stored
// for the finish. Traffic: mean, target and raw once, each gradient once.
//
// Masked: there is a weight for each position. It is loaded before the elements, and where those of W are all 0
// nothing else is.
#pragma once

#include "heteroscedastic_math.h"
#include "reduce.h"
#include "weights.h"

namespace vidfast::cuda {
namespace {

// n where that is not more than W, else W + 1: W steps do not count it down.
template <int W>
__device__ inline int at_most(int64_t n) {
  return n > W ? W + 1 : static_cast<int>(n);
}

// W neighbouring elements: the first, its row, and how many there are.
struct Neighbours {
  int64_t first, outer;
  int count;
  int left;  // of the first's row, if not more than W

  template <int W>
  __device__ static Neighbours find(const HeteroscedasticArgs& a, int64_t vector) {
    Neighbours n{vector * W, 0, 0, W + 1};
    const int64_t all = a.count - n.first;
    n.count = all < W ? (all > 0 ? static_cast<int>(all) : 0) : W;
    if (a.joined || n.count == 0) return n;
    n.outer = quotient(n.first, a.by_row);
    n.left = at_most<W>((n.outer + 1) * a.row - n.first);
    return n;
  }
};

// Calls one(i, address) for each of the neighbours in a tensor.
template <class T, int W, class One>
__device__ inline void for_each_element(const HeteroscedasticArgs& a, const Strided& t, unsigned char* first,
                                        const Neighbours& n, const One& one) {
  const int64_t bytes = is_any<T> ? t.bytes : static_cast<int64_t>(sizeof(T));
  const int row = at_most<W>(a.row);
  unsigned char* at = first;
  int left = n.left;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i < n.count) one(i, at);
    at += bytes;
    if (--left == 0) {
      at += t.gap_bytes;
      left = row;
    }
  }
}

template <class T, int W>
__device__ inline unsigned char* address_of(const Strided& t, const Neighbours& n) {
  return t.data + n.first * (is_any<T> ? t.bytes : static_cast<int64_t>(sizeof(T))) + n.outer * t.gap_bytes;
}

template <class T, int W>
__device__ inline void load_neighbours(const HeteroscedasticArgs& a, const Strided& t, const Neighbours& n,
                                       Vector<T, W>& into) {
  unsigned char* first = address_of<T, W>(t, n);
  if constexpr (is_any<T>) {
    into = {};
    for_each_element<T, W>(a, t, first, n,
                           [&](int i, const void* p) { into.element[i] = load_as<double>(p, t.dtype, 0); });
  } else {
    if (t.vectors && n.count == W) return into.load(first, t.dtype);
    T element[W] = {};
    for_each_element<T, W>(a, t, first, n, [&](int i, const void* p) { element[i] = *static_cast<const T*>(p); });
    memcpy(into.word, element, sizeof(element));
  }
}

// W results, each rounded once, as they go to memory.
template <class T, int W>
struct Rounded {
  T element[W];

  template <class Acc>
  __device__ void set(int i, Acc x) {
    element[i] = narrow<T>(x);
  }
  // Their signs turned.
  __device__ Rounded negative() const {
    constexpr int words = W * sizeof(T) / 4;
    unsigned word[words];
    memcpy(word, element, sizeof(element));
#pragma unroll
    for (int i = 0; i < words; ++i)
      word[i] ^= sizeof(T) == 2 ? 0x80008000u : sizeof(T) == 4 || i % 2 == 1 ? 0x80000000u : 0u;
    Rounded out;
    memcpy(out.element, word, sizeof(element));
    return out;
  }
  __device__ void store(const HeteroscedasticArgs& a, const Strided& t, const Neighbours& n) const {
    unsigned char* first = address_of<T, W>(t, n);
    if (t.vectors && n.count == W) {
      Vector<T, W> v;
      memcpy(v.word, element, sizeof(element));
#pragma unroll
      for (int i = 0; i < v.words; ++i) reinterpret_cast<uint4*>(first)[i] = v.word[i];
    } else {
      for_each_element<T, W>(a, t, first, n, [&](int i, void* p) { *static_cast<T*>(p) = element[i]; });
    }
  }
};
template <int W>
struct Rounded<Any, W> {
  double element[W];

  __device__ void set(int i, double x) { element[i] = x; }
  __device__ Rounded negative() const {
    Rounded out;
#pragma unroll
    for (int i = 0; i < W; ++i) out.element[i] = -element[i];
    return out;
  }
  __device__ void store(const HeteroscedasticArgs& a, const Strided& t, const Neighbours& n) const {
    for_each_element<Any, W>(a, t, address_of<Any, W>(t, n), n,
                             [&](int i, void* p) { store_as(p, t.dtype, 0, element[i]); });
  }
};

template <class M, class T, bool Sum, bool Masked>
struct Sweep {
  using Acc = typename Triple<M, T>::Acc;
  static constexpr int W = Triple<M, T>::width;
  static constexpr bool one_type = std::is_same_v<M, T>;

  const HeteroscedasticArgs& a;
  Acc gk;  // k, times the incoming gradient where there is one

  struct Loaded {
    Vector<M, W> mean, raw;
    Vector<T, W> target;
  };
  struct Gradients {
    Rounded<M, W> mean, raw;
    Rounded<T, W> target;
  };

  __device__ void load(const Neighbours& n, Loaded& into) const {
    load_neighbours<M, W>(a, a.mean, n, into.mean);
    load_neighbours<T, W>(a, a.target, n, into.target);
    load_neighbours<M, W>(a, a.raw, n, into.raw);
  }

  // Of each of the neighbours.
  __device__ void load_weights(const Neighbours& n, Acc (&w)[1][W]) const {
    const Weights<Acc, Triple<M, T>::any> weights{a.positions, a.position_bytes};
    const int64_t run = quotient(n.first, a.by_inner);
    const int64_t block = quotient(run, a.by_channels);
    const int64_t in_run = n.first - run * a.inner;
    int64_t position = block * a.inner + in_run;
    if (a.access == WeightAccess::one) {
      Acc of_all[1];
      weights.load(of_all, [&](int) { return position; });
#pragma unroll
      for (int i = 0; i < W; ++i) w[0][i] = of_all[0];
    } else if (a.access == WeightAccess::vector && n.count == W) {
      weights.load_vectors(w, [&](int) { return position; });
    } else {
      // What is left of the run and of its block's runs.
      int left = at_most<W>(a.inner - in_run), runs = at_most<W>(a.channels - (run - block * a.channels));
      weights.load(w[0], [&](int i) {
        const int64_t here = i < n.count ? position : -1;
        ++position;
        if (--left == 0) {
          left = at_most<W>(a.inner);
          if (--runs == 0)
            runs = at_most<W>(a.channels);  // the next block's positions follow
          else
            position -= a.inner;
        }
        return here;
      });
    }
  }

  // The gradients of `count` neighbours; the sum of their terms.
  template <Transform K>
  __device__ Acc compute(int count, const Loaded& loaded, const Acc (&w)[1][W], Gradients& gradients) const {
    Acc x[W], y[W], u[W], sum = 0;
    loaded.mean.unpack(x);
    loaded.target.unpack(y);
    loaded.raw.unpack(u);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Element<Acc> e = element_of<K, Sum, Masked>(a, gk, x[i], y[i], u[i], w[0][i]);
      if (Sum && i < count) sum += e.term;
      gradients.mean.set(i, e.grad_mean);
      if constexpr (!Sum && !one_type) gradients.target.set(i, -e.grad_mean);
      gradients.raw.set(i, e.grad_raw);
    }
    return sum;
  }
  __device__ Acc compute(int count, const Loaded& loaded, const Acc (&w)[1][W], Gradients& gradients) const {
    switch (a.transform) {
      case Transform::softplus: return compute<Transform::softplus>(count, loaded, w, gradients);
      case Transform::exp: return compute<Transform::exp>(count, loaded, w, gradients);
      case Transform::log_variance: return compute<Transform::log_variance>(count, loaded, w, gradients);
      case Transform::clamp: return compute<Transform::clamp>(count, loaded, w, gradients);
    }
    return 0;
  }

  __device__ void store(const Neighbours& n, Gradients& gradients) const {
    if (a.grad_mean.data != nullptr) gradients.mean.store(a, a.grad_mean, n);
    if (a.grad_raw.data != nullptr) gradients.raw.store(a, a.grad_raw, n);
    if constexpr (!Sum) {
      if (a.grad_target.data == nullptr) return;
      if constexpr (one_type)
        gradients.mean.negative().store(a, a.grad_target, n);
      else
        gradients.target.store(a, a.grad_target, n);
    }
  }

  // The sum of the terms of these neighbours, whose gradients are stored.
  __device__ double take(const Neighbours& n, const Loaded& loaded, const Acc (&w)[1][W]) const {
    Gradients gradients;
    const Acc sum = compute(n.count, loaded, w, gradients);
    store(n, gradients);
    return static_cast<double>(sum);
  }

  // Vectors first, first + kThreads, ..., `batches` of them.
  __device__ double walk(int64_t vector) const {
    double sum = 0;
    Acc w[1][W] = {};
    if constexpr (Masked || !Triple<M, T>::ahead) {
      for (int left = a.batches; left > 0; --left, vector += kThreads) {
        const Neighbours n = Neighbours::find<W>(a, vector);
        if (n.count == 0) break;
        if constexpr (Masked) load_weights(n, w);
        Loaded loaded{};
        if (!Masked || any(w[0])) load(n, loaded);
        sum += take(n, loaded, w);
      }
    } else {
      Neighbours n = Neighbours::find<W>(a, vector);
      if (n.count == 0) return 0;
      Loaded loaded;
      load(n, loaded);
      for (int left = a.batches - 1;; --left) {
        vector += kThreads;
        Neighbours next = Neighbours::find<W>(a, vector);
        if (left == 0) next.count = 0;
        Loaded ahead;
        if (next.count > 0) load(next, ahead);
        sum += take(n, loaded, w);
        if (next.count == 0) break;
        n = next;
        loaded = ahead;
      }
    }
    return sum;
  }
};

template <class M, class T, bool Sum, bool Masked>
__global__ void __launch_bounds__(kThreads, (is_double<typename Triple<M, T>::Acc> ? 2 : 4))
    heteroscedastic(const __grid_constant__ HeteroscedasticArgs a) {
  using Acc = typename Triple<M, T>::Acc;
  if constexpr (Sum) let_next_start();
  double gk = a.totals == nullptr ? a.k : a.totals[1];
  if constexpr (!Sum) gk *= load_as<double>(a.g, a.g_dtype, 0);
  const Sweep<M, T, Sum, Masked> sweep{a, static_cast<Acc>(gk)};
  double sum = sweep.walk(static_cast<int64_t>(blockIdx.x) * a.batches * kThreads + threadIdx.x);
  if constexpr (Sum) {
    sum = block_sum(reinterpret_cast<double*>(shared_memory()), sum);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
  }
}

template <class M, class T, bool Sum, bool Masked>
void launch_triple(const HeteroscedasticArgs& a, cudaStream_t stream) {
  launch(Sum ? "heteroscedastic (forward)" : "heteroscedastic (backward)", &heteroscedastic<M, T, Sum, Masked>,
         a.blocks, Sum ? kWarps * sizeof(double) : 0, stream, a);
}

template <bool Masked>
void launch_heteroscedastic_of(const HeteroscedasticArgs& a, bool sums, cudaStream_t stream) {
#define VIDFAST_LAUNCH(M, T)                                                       \
  if (is_of<M>(a.mean.dtype) && is_of<M>(a.raw.dtype) && is_of<T>(a.target.dtype)) \
    return sums ? launch_triple<M, T, true, Masked>(a, stream) : launch_triple<M, T, false, Masked>(a, stream);
  VIDFAST_CUDA_TRIPLES(VIDFAST_LAUNCH)
#undef VIDFAST_LAUNCH
}

}  // namespace
}  // namespace vidfast::cuda
