// The weights of positions, as masked kernels read them, and what an element becomes under its weight.
#pragma once

#include "args.h"

namespace vidfast::cuda {

// From `base` on: bytes, or numbers of the type that r is computed in, which is fp32 or fp64. Which is known at run
// time and the same for all threads. Several weights are read at once, and converted behind all their loads, so that
// none waits for another. Any: a kernel that computes in fp64 whatever the numbers are.
template <class Acc, bool Any>
struct Weights {
  const unsigned char* base;
  int size;  // of a weight: 1, 4 or 8 bytes

  // w[j] is the weight number at(j), or 0 where that is negative.
  template <int N, class At>
  __device__ void load(Acc (&w)[N], const At& at) const {
    if (size == 1) return load_each<uint8_t>(w, at);
    if constexpr (Any)
      if (size == 4) return load_each<float>(w, at);
    load_each<Acc>(w, at);
  }
  // w[u] are the W weights from number at(u) on, or 0 where that is negative; each W are one access, or 16 bytes are.
  template <int U, int W, class At>
  __device__ void load_vectors(Acc (&w)[U][W], const At& at) const {
    if (size == 1) return load_bytes(w, at);
    if constexpr (Any)
      if (size == 4) return load_words<float>(w, at);
    load_words<Acc>(w, at);
  }
  // Whether they may be, from number i on.
  template <int W>
  __device__ bool aligned_at(int64_t i) const {
    return reinterpret_cast<uintptr_t>(base + i * size) % (size == 1 ? W : 16) == 0;
  }

 private:
  template <class Number, int N, class At>
  __device__ void load_each(Acc (&w)[N], const At& at) const {
    Number raw[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t i = at(j);
      raw[j] = i < 0 ? Number(0) : reinterpret_cast<const Number*>(base)[i];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = static_cast<Acc>(raw[j]);
  }
  template <class Number, int U, int W, class At>
  __device__ void load_words(Acc (&w)[U][W], const At& at) const {
    Vector<Number, W> raw[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = at(u);
      raw[u] = {};
      if (i >= 0) raw[u].load(base + i * static_cast<int64_t>(sizeof(Number)), DType::f32);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) raw[u].unpack(w[u]);
  }
  template <int U, int W, class At>
  __device__ void load_bytes(Acc (&w)[U][W], const At& at) const {
    using Word = std::conditional_t<W == 2, uint16_t, std::conditional_t<W == 4, uint32_t, uint64_t>>;
    static_assert(sizeof(Word) == W, "a byte an element");
    Word raw[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = at(u);
      raw[u] = i < 0 ? Word(0) : *reinterpret_cast<const Word*>(base + i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int e = 0; e < W; ++e) w[u][e] = static_cast<Acc>(static_cast<unsigned>(raw[u] >> (8 * e)) & 0xffu);
  }
};

// Whether any of these weights counts. NaN does.
template <class Acc, int W>
__device__ inline bool any(const Acc (&w)[W]) {
  bool found = false;
#pragma unroll
  for (int e = 0; e < W; ++e) found = found || w[e] != 0;
  return found;
}

// The gradient of one element, whose square is added to `sum`. Where its weight is 0, x and y may be anything.
template <bool Sum, bool Masked, class Acc>
__device__ inline Acc gradient_of(Acc x, Acc y, [[maybe_unused]] Acc w, Acc scale, Acc& sum) {
  if constexpr (Masked) {
    const Acc r = w != 0 ? x - y : Acc(0);
    const Acc weighted = w * r;
    if (Sum) sum += weighted * r;
    return w != 0 ? weighted * scale : Acc(0);
  } else {
    const Acc r = x - y;
    if (Sum) sum += r * r;
    return r * scale;
  }
}

}  // namespace vidfast::cuda
