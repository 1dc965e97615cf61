// Elements of activations: their dtypes, conversions and 128-bit accesses.
#pragma once

#include <cstring>
#include <type_traits>

#include "../gaussian_nll.h"
#include "device.h"

namespace vidfast::cuda {

// An element whose dtype is known only at run time: the rare mixtures share one kernel and compute in fp64.
struct Any {};

template <class T>
constexpr bool is_any = std::is_same_v<T, Any>;
template <class T>
constexpr bool is_double = std::is_same_v<T, double>;

// How a pair of dtypes is computed.
template <class M, class T>
struct Pair {
  static constexpr bool any = is_any<M> || is_any<T>;
  static_assert(is_any<M> == is_any<T>, "a pair is known wholly or not at all");
  using Acc = std::conditional_t<any || is_double<M> || is_double<T>, double, float>;  // of r and of runs of r^2
  static constexpr int smaller = sizeof(M) < sizeof(T) ? sizeof(M) : sizeof(T);
  // Elements a thread takes at a time: the narrower tensor fills a 128-bit access.
  static constexpr int width = any ? 4 : 16 / smaller;
  // Such vectors in flight before the first use: 128 bytes of loads a thread, however wide the pair.
  static constexpr int batch = any ? 2 : 128 / (width * static_cast<int>(sizeof(M) + sizeof(T)));
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }
template <class Acc, class T>
__device__ inline Acc widen(T x) {
  if constexpr (is_double<T>)
    return static_cast<Acc>(x);
  else
    return static_cast<Acc>(to_float(x));
}

template <class T, class Acc>
__device__ inline T narrow(Acc x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, f16>)
    return __float2half_rn(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// One element at base[i], of a dtype known at run time.
template <class Acc>
__device__ inline Acc load_as(const void* base, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<Acc>(static_cast<const float*>(base)[i]);
    case DType::f64: return static_cast<Acc>(static_cast<const double*>(base)[i]);
    case DType::bf16: return static_cast<Acc>(to_float(static_cast<const bf16*>(base)[i]));
    case DType::f16: return static_cast<Acc>(to_float(static_cast<const f16*>(base)[i]));
  }
  return 0;
}
// One number of a dtype known at run time as it is in memory, not yet waited for.
struct Raw {
  uint64_t bits;
  DType dtype;

  __device__ Raw() : bits(0), dtype(DType::f64) {}
  __device__ Raw(const void* base, DType t, int64_t i) : dtype(t) {
    switch (t) {
      case DType::f64: bits = static_cast<const uint64_t*>(base)[i]; break;
      case DType::f32: bits = static_cast<const uint32_t*>(base)[i]; break;
      case DType::bf16:
      case DType::f16: bits = static_cast<const uint16_t*>(base)[i]; break;
    }
  }
  __device__ double value() const {
    switch (dtype) {
      case DType::f64: return as<double>(bits);
      case DType::f32: return as<float>(static_cast<uint32_t>(bits));
      case DType::bf16: return to_float(as<bf16>(static_cast<uint16_t>(bits)));
      case DType::f16: return to_float(as<f16>(static_cast<uint16_t>(bits)));
    }
    return 0;
  }

 private:
  template <class T, class Bits>
  __device__ static T as(Bits b) {
    T x;
    memcpy(&x, &b, sizeof(x));
    return x;
  }
};

template <class Acc>
__device__ inline void store_as(void* base, DType t, int64_t i, Acc x) {
  switch (t) {
    case DType::f32: static_cast<float*>(base)[i] = static_cast<float>(x); break;
    case DType::f64: static_cast<double*>(base)[i] = x; break;
    case DType::bf16: static_cast<bf16*>(base)[i] = narrow<bf16>(x); break;
    case DType::f16: static_cast<f16*>(base)[i] = narrow<f16>(x); break;
  }
}

// W neighbouring elements as they come from memory: registers, not yet converted, so that loads can run ahead.
template <class T, int W>
struct Vector {
  static_assert(W * sizeof(T) % 16 == 0, "vectors are made of 128-bit words");
  static constexpr int words = W * sizeof(T) / 16;
  uint4 word[words];

  __device__ void load(const void* p, DType) {
#pragma unroll
    for (int i = 0; i < words; ++i) word[i] = static_cast<const uint4*>(p)[i];
  }
  template <class Acc>
  __device__ void unpack(Acc (&x)[W]) const {
    T element[W];
    memcpy(element, word, sizeof(element));
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = widen<Acc>(element[i]);
  }
};

// For Any the words depend on the dtype, and an element is converted as it comes.
template <int W>
struct Vector<Any, W> {
  double element[W];

  __device__ void load(const void* p, DType t) {
#pragma unroll
    for (int i = 0; i < W; ++i) element[i] = load_as<double>(p, t, i);
  }
  __device__ void unpack(double (&x)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = element[i];
  }
};

// Stores sign * x[i] at p[i], each rounded once.
template <class T, int W, class Acc>
__device__ inline void store_vector(void* p, DType t, const Acc (&x)[W], Acc sign) {
  if constexpr (is_any<T>) {
#pragma unroll
    for (int i = 0; i < W; ++i) store_as(p, t, i, sign * x[i]);
  } else {
    T element[W];
#pragma unroll
    for (int i = 0; i < W; ++i) element[i] = narrow<T>(sign * x[i]);
    uint4 word[Vector<T, W>::words];
    memcpy(word, element, sizeof(element));
#pragma unroll
    for (int i = 0; i < Vector<T, W>::words; ++i) static_cast<uint4*>(p)[i] = word[i];
  }
}

template <class Acc, class T>
__device__ inline Acc load_element(const void* p, DType t) {
  if constexpr (is_any<T>)
    return load_as<Acc>(p, t, 0);
  else
    return widen<Acc>(*static_cast<const T*>(p));
}
template <class T, class Acc>
__device__ inline void store_element(void* p, DType t, Acc x) {
  if constexpr (is_any<T>)
    store_as(p, t, 0, x);
  else
    *static_cast<T*>(p) = narrow<T>(x);
}

// A View with its element's size; data == nullptr: absent.
struct Tensor {
  unsigned char* data;
  int64_t stride;  // between outer indices, in elements
  DType dtype;
  int bytes;           // of an element
  int64_t row_bytes;   // RowChunks: from one (joined) row to the next
  int64_t step_bytes;  // to the next row of a thread, or the next plane of a warp

  // The address of element i; T is this tensor's element, or Any.
  template <class T>
  __host__ __device__ unsigned char* at(int64_t i) const {
    if constexpr (is_any<T>)
      return data + i * bytes;
    else
      return data + i * static_cast<int64_t>(sizeof(T));
  }
};

// Whether a vector may begin at p. Any takes elements one by one, at any address.
template <class T>
__host__ __device__ inline bool aligned(const void* p) {
  return is_any<T> || reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A warp takes n neighbouring elements as vectors between a head and a tail of single elements, each shorter than a
// vector. The head: the elements from p on before the first address of a vector, at most n.
template <class T, class N>
__device__ inline N head_elements(const void* p, N n) {
  if constexpr (is_any<T>) {
    return 0;
  } else {
    const N head = static_cast<N>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
    return head > n ? n : head;
  }
}
// Head and tail: calls one(i) for the element i of this lane, if it has one. Those of the head come first.
template <class N, class One>
__device__ inline void for_edge_element(int lane, N head, N tail, N n, const One& one) {
  if (lane < head + tail) one(lane < head ? lane : n - (head + tail) + lane);
}

}  // namespace vidfast::cuda
