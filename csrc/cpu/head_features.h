// A head's features in memory of any strides, and tiles of them with the channels fastest. A tile's positions are
// neighbours in the whole, and may be of several samples.
#pragma once

#include <algorithm>

#include "head_product.h"
#include "transpose.h"

namespace vidfast::cpu {
namespace {

// f(a value of the type) for the types that features and weights have.
template <class F>
inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16: f(bf16()); break;
    case DType::f16: f(f16()); break;
    default: f(float()); break;
  }
}

// f(row of the tile, elements from the feature's start, how many) for each run of positions of one sample.
template <class F>
inline void runs_of(const HeadProblem& p, const Feature& x, int64_t begin, int64_t count, const F& f) {
  for (int64_t row = 0; row < count;) {
    const int64_t sample = (begin + row) / p.positions, position = (begin + row) % p.positions;
    const int64_t n = std::min(count - row, p.positions - position);
    f(row, sample * x.batch_stride + position * x.position_stride, n);
    row += n;
  }
}

// to[row][kMostColumns] = the feature's channels [channel, channel + wanted) at the tile's positions; zeros elsewhere.
template <class P>
void read_as(const HeadProblem& p, const Feature& x, int64_t channels, int64_t begin, int64_t count, int64_t channel,
             int64_t wanted, float* to) {
  const int64_t there = std::clamp<int64_t>(channels - channel, 0, wanted);
  if (there < wanted || count < whole_groups(count))
    for (int64_t r = 0; r < whole_groups(count); ++r)
      for (int64_t c = 0; c < wanted; ++c) to[r * kMostColumns + c] = 0;
  runs_of(p, x, begin, count, [&](int64_t row, int64_t offset, int64_t n) {
    const P* from = static_cast<const P*>(x.data) + offset + channel * x.channel_stride;
    float* out = to + row * kMostColumns;
    int64_t turned = 0, whole = 0;  // channels and positions that were taken in blocks
    if (x.position_stride == 1) {
      turned = there / 8 * 8, whole = n / 8 * 8;
      for (int64_t c = 0; c < turned; c += 8)
        for (int64_t r = 0; r < whole; r += 8) {
          __m256 block[8];
          for (int i = 0; i < 8; ++i) block[i] = load8(from + (c + i) * x.channel_stride + r);
          transpose8(block);
          for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (r + i) * kMostColumns + c, block[i]);
        }
    }
    for (int64_t r = 0; r < n; ++r) {
      const P* at = from + r * x.position_stride;
      int64_t c = r < whole ? turned : 0;
      if (x.channel_stride == 1)
        for (; there - c >= 8; c += 8) _mm256_storeu_ps(out + r * kMostColumns + c, load8(at + c));
      for (; c < there; ++c) out[r * kMostColumns + c] = VF::get(at + c * x.channel_stride);
    }
  });
}

inline void read(const HeadProblem& p, const Feature& x, int64_t channels, int64_t begin, int64_t count,
                 int64_t channel, int64_t wanted, float* to) {
  with_type(x.dtype, [&](auto type) { read_as<decltype(type)>(p, x, channels, begin, count, channel, wanted, to); });
}

// Writes a tile to the feature: the channels and positions that exist, nothing of what was filled up.
template <class P>
void write_as(const HeadProblem& p, const Feature& x, int64_t channels, int64_t begin, int64_t count, int64_t channel,
              int64_t wanted, const float* from) {
  const int64_t there = std::min(channels - channel, wanted);
  runs_of(p, x, begin, count, [&](int64_t row, int64_t offset, int64_t n) {
    P* to = static_cast<P*>(x.data) + offset + channel * x.channel_stride;
    const float* in = from + row * kMostColumns;
    int64_t turned = 0, whole = 0;
    if (x.position_stride == 1) {
      turned = there / 8 * 8, whole = n / 8 * 8;
      for (int64_t c = 0; c < turned; c += 8)
        for (int64_t r = 0; r < whole; r += 8) {
          __m256 block[8];
          for (int i = 0; i < 8; ++i) block[i] = _mm256_loadu_ps(in + (r + i) * kMostColumns + c);
          transpose8(block);
          for (int i = 0; i < 8; ++i) store8(to + (c + i) * x.channel_stride + r, block[i]);
        }
    }
    for (int64_t r = 0; r < n; ++r) {
      P* at = to + r * x.position_stride;
      int64_t c = r < whole ? turned : 0;
      if (x.channel_stride == 1)
        for (; there - c >= 8; c += 8) store8(at + c, _mm256_loadu_ps(in + r * kMostColumns + c));
      for (; c < there; ++c) VF::put(at + c * x.channel_stride, in[r * kMostColumns + c]);
    }
  });
}

inline void write(const HeadProblem& p, const Feature& x, int64_t channels, int64_t begin, int64_t count,
                  int64_t channel, int64_t wanted, const float* from) {
  with_type(x.dtype, [&](auto type) { write_as<decltype(type)>(p, x, channels, begin, count, channel, wanted, from); });
}

}  // namespace
}  // namespace vidfast::cpu
