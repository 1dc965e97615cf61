// The tasks of a head, written once over the vectors of whichever simd_*.h was included before this file, and over
// `Words`: what a 32-bit word of a matrix is. Everything is in an unnamed namespace: each instruction set's translation
// unit keeps its own copy.
//
// With x_1 the student, x_l+1 = relu(W_l x_l + b_l) and the last one, without ReLU, the mean mu(s) of equation 5 (Ahn
// et al., CVPR 2019), for an incoming gradient of 1:
//   d mean_c = k (mean_c - t_c) / v_c,  d x_l = W_l^T d x_l+1 where x_l > 0,  d W_l = sum over positions d x_l+1 x_l^T
#pragma once

#include <algorithm>
#include <type_traits>

#include "head_features.h"

namespace vidfast::cpu {
namespace {

// The sum of a weight's gradient that the position's unit is added to.
inline float* lane_of(const HeadPart& part, int64_t layer, int64_t position) {
  const int64_t lane = position / part.unit % part.lanes;
  if (lane == 0) return part.first_lane[layer];
  return part.other_lanes[layer] + (lane - 1) * part.layers[layer].out * part.layers[layer].into;
}

template <class Words>
struct HeadTasks {
  // Where the tile's rows begin.
  static float* rows(const HeadMatrix& m, int64_t row) { return m.rows + row * m.row; }
  static float* pairs(const HeadMatrix& m, int64_t row) { return m.pairs + row / Words::kValues * m.pair; }

  // Two rows' vectors at a column into both forms.
  static void put(const HeadMatrix& m, int64_t row, int64_t column, Reg first, Reg second) {
    Words::put(rows(m, row) + column / Words::kValues, m.row, pairs(m, row) + column, first, second);
  }

  // Some rows of a part, of which `count` are positions; whole groups of rows are computed.
  struct Rows {
    int64_t first, count, computed;
    const float* weights;  // [kHeadTile], 0 where there is no position; nullptr: all positions count alike
  };

  // Zeros where there is no position or no channel: there a product is a bias, or a zero times infinity.
  static void clear_outside(const HeadMatrix& m, const Rows& tile, int64_t channels) {
    if (tile.count == tile.computed && channels % kHeadPad == 0) return;
    for (int64_t r = 0; r < tile.computed; ++r)
      for (int64_t c = r < tile.count ? channels : 0; c < padded(channels); ++c)
        Words::clear(rows(m, tile.first + r), pairs(m, tile.first + r), r, c);
  }

  // A weight as the second matrix of a product, in panels, with the vector that its sums begin with or nullptr.
  struct Weight {
    const float* words;
    const float* start;
    int64_t into, columns;
  };

  static Weight forward(const HeadPart& part, int l) {
    const HeadLayerPlan& layer = part.layers[l];
    return {layer.forward, layer.bias, layer.into, layer.out};
  }

  static Weight backward(const HeadPart& part, int l) {
    const HeadLayerPlan& layer = part.layers[l];
    return {layer.backward, nullptr, layer.out, layer.into};
  }

  // For each panel of the weight before(column, columns), and for each group of rows in it finish(row of the tile,
  // column, sums, how many vectors they are as a type).
  template <class Before, class Finish>
  static void product(const HeadMatrix& a, const Rows& tile, const Weight& w, const Before& before,
                      const Finish& finish) {
    const int64_t depth = w.into / Words::kValues, columns = w.columns;
    for (int64_t panel = 0; panel < panels(columns); ++panel) {
      const int64_t column = panel_begin(columns, panel);
      const float* b = w.words + column * depth;
      before(column, panel_begin(columns, panel + 1) - column);
      with_vectors(columns, panel, [&](auto vectors) {
        constexpr int N = decltype(vectors)::value;
        for (int64_t row = 0; row < tile.computed; row += kGroup) {
          Sums<N> sums;
          VIDFAST_UNROLL
          for (int n = 0; n < N; ++n) {
            const Reg begin = w.start == nullptr ? VF::set1(0) : VF::load(w.start + column + n * VF::W);
            VIDFAST_UNROLL
            for (int r = 0; r < kGroup; ++r) sums.at[r][n] = begin;
          }
          // Of 16 registers rounding to 16 bits would keep some for its constants.
          constexpr bool apart = VF::W < 16 && Words::kRounds;
          (apart ? multiply_apart<Words, N> : multiply<Words, N>)(rows(a, tile.first + row), a.row, 1, b, N * VF::W,
                                                                  depth, sums);
          finish(row, column, sums, vectors);
        }
      });
    }
  }

  static void nothing(int64_t, int64_t) {}

  static void tile(const HeadPart& part, int64_t index) {
    const int64_t first = index * kHeadTile;
    const int64_t count = std::min(part.count - first, kHeadTile);
    alignas(64) float weights[kHeadTile];
    Rows tile{first, count, whole_groups(count), nullptr};
    if (part.left_out != nullptr) {
      part.left_out[index] = !read_weights(*part.problem, part.begin + first, count, weights);
      if (part.left_out[index]) {
        leave_out(part, tile, index);
        return;
      }
      tile.weights = weights;
    }
    alignas(64) float strip[kHeadTile * kMostColumns];
    const int last = part.problem->layer_count - 1;
    read_student(part, tile, strip);
    for (int l = 0; l < last; ++l) hidden(part, tile, l);
    double* sum_sq = part.sum_sq + index * part.layers[last].out;
    tile.weights != nullptr ? loss<true>(part, tile, sum_sq, strip) : loss<false>(part, tile, sum_sq, strip);
    for (int64_t l = last; l >= std::max<int64_t>(part.lowest, 1); --l)
      hidden_backward(part, tile, static_cast<int>(l));
    if (part.lowest == 0) write_student(part, tile, strip);
    for (int l = 0; l <= last; ++l)
      if (part.layers[l].bias_sums != nullptr)
        add_up(part.gradients[l + 1], tile, part.layers[l].out, part.layers[l].bias_sums + index * part.layers[l].out);
  }

  // to [kHeadTile] = the weights of so many positions, and 0; false if all are 0.
  static bool read_weights(const HeadProblem& p, int64_t begin, int64_t count, float* to) {
    bool any = false;
    for (int64_t r = 0; r < kHeadTile; ++r) {
      to[r] = r >= count            ? 0.0f
              : p.weights_are_bytes ? static_cast<const uint8_t*>(p.weights)[begin + r]
                                    : static_cast<const float*>(p.weights)[begin + r];
      any |= to[r] != 0;
    }
    return any;
  }

  // What a tile gives of which no position counts. Its rows are not read.
  static void leave_out(const HeadPart& part, const Rows& tile, int64_t index) {
    const HeadProblem& p = *part.problem;
    std::fill_n(part.sum_sq + index * padded(p.channels), padded(p.channels), 0.0);
    for (int l = 0; l < p.layer_count; ++l)
      if (part.layers[l].bias_sums != nullptr)
        std::fill_n(part.layers[l].bias_sums + index * part.layers[l].out, part.layers[l].out, 0.0f);
    if (part.lowest > 0) return;
    alignas(64) float zeros[kHeadTile * kMostColumns] = {};
    for (int64_t column = 0; column < p.layers[0].into; column += kMostColumns)
      write(p, p.grad_student, p.layers[0].into, part.begin + tile.first, tile.count, column, kMostColumns, zeros);
  }

  // Zeros in a strip where a position does not count, whatever is there.
  static void clear_uncounted(const Rows& tile, float* strip, int64_t columns) {
    if (tile.weights == nullptr) return;
    for (int64_t r = 0; r < tile.count; ++r)
      if (tile.weights[r] == 0) std::fill_n(strip + r * kMostColumns, columns, 0.0f);
  }

  static void read_student(const HeadPart& part, const Rows& tile, float* strip) {
    const HeadProblem& p = *part.problem;
    const HeadMatrix& to = part.activations[0];
    for (int64_t column = 0; column < part.layers[0].into; column += kHeadPad) {
      read(p, p.student, p.layers[0].into, part.begin + tile.first, tile.count, column, kHeadPad, strip);
      clear_uncounted(tile, strip, kHeadPad);
      for (int64_t r = 0; r < tile.computed; r += 2)
        for (int64_t c = 0; c < kHeadPad; c += VF::W)
          put(to, tile.first + r, column + c, VF::load(strip + r * kMostColumns + c),
              VF::load(strip + (r + 1) * kMostColumns + c));
    }
  }

  // What a layer with a ReLU behind it gives.
  static void hidden(const HeadPart& part, const Rows& tile, int l) {
    const HeadMatrix& out = part.activations[l + 1];
    product(part.activations[l], tile, forward(part, l), nothing,
            [&](int64_t row, int64_t column, auto& sums, auto vectors) {
              VIDFAST_UNROLL
              for (int r = 0; r < kGroup; r += 2) {
                VIDFAST_UNROLL
                for (int n = 0; n < vectors.value; ++n)
                  put(out, tile.first + row + r, column + n * VF::W, VF::positive(sums.at[r][n]),
                      VF::positive(sums.at[r + 1][n]));
              }
            });
    clear_outside(out, tile, part.problem->layers[l].out);
  }

  // The last product and, as long as its sums are in registers, the residuals and the mean's gradient.
  template <bool Weighted>
  static void loss(const HeadPart& part, const Rows& tile, double* sum_sq, float* strip) {
    const HeadProblem& p = *part.problem;
    const int last = p.layer_count - 1;
    const bool keep = part.lowest <= p.layer_count;
    const HeadMatrix& out = part.gradients[last + 1];
    alignas(64) float sums_sq[kMostColumns];
    product(
        part.activations[last], tile, forward(part, last),
        [&](int64_t column, int64_t columns) {
          read(p, p.target, p.channels, part.begin + tile.first, tile.count, column, columns, strip);
          for (int64_t c = 0; c < columns; ++c) sums_sq[c] = 0;
        },
        [&](int64_t row, int64_t column, auto& sums, auto vectors) {
          constexpr int N = decltype(vectors)::value;
          VIDFAST_UNROLL
          for (int n = 0; n < N; ++n) {
            const Reg scale = VF::load(part.scale + column + n * VF::W);
            Reg sum = VF::load(sums_sq + n * VF::W);
            VIDFAST_UNROLL
            for (int r = 0; r < kGroup; ++r) {
              const Reg target = VF::load(strip + (row + r) * kMostColumns + n * VF::W);
              Reg residual = VF::sub(Words::rounded(sums.at[r][n]), target);
              if constexpr (Weighted) {
                const Reg weight = VF::set1(tile.weights[row + r]);
                residual = VF::where_not_zero(residual, weight);
                const Reg weighted = VF::mul(weight, residual);
                sum = VF::multiply_add(weighted, residual, sum);
                sums.at[r][n] = VF::where_not_zero(VF::mul(weighted, scale), weight);
              } else {
                if (row + r >= tile.count) residual = VF::set1(0);
                sum = VF::multiply_add(residual, residual, sum);
                sums.at[r][n] = VF::mul(residual, scale);
              }
            }
            VF::store(sums_sq + n * VF::W, sum);
            if (keep) {
              VIDFAST_UNROLL
              for (int r = 0; r < kGroup; r += 2)
                put(out, tile.first + row + r, column + n * VF::W, sums.at[r][n], sums.at[r + 1][n]);
            }
          }
          if (row + kGroup == tile.computed)
            for (int64_t c = 0; c < N * VF::W; ++c) sum_sq[column + c] = static_cast<double>(sums_sq[c]);
        });
    if (keep) clear_outside(out, tile, p.channels);
  }

  // The gradient of what goes into a layer that has a ReLU before it.
  static void hidden_backward(const HeadPart& part, const Rows& tile, int l) {
    const HeadMatrix& activation = part.activations[l];
    const HeadMatrix& out = part.gradients[l];
    product(part.gradients[l + 1], tile, backward(part, l), nothing,
            [&](int64_t row, int64_t column, auto& sums, auto vectors) {
              VIDFAST_UNROLL
              for (int r = 0; r < kGroup; r += 2) {
                VIDFAST_UNROLL
                for (int n = 0; n < vectors.value; ++n) {
                  const int64_t at = column + n * VF::W;
                  const float* x = rows(activation, tile.first + row + r) + at / Words::kValues;
                  put(out, tile.first + row + r, at, Words::where_not_zero(sums.at[r][n], x),
                      Words::where_not_zero(sums.at[r + 1][n], x + activation.row));
                }
              }
            });
  }

  static void write_student(const HeadPart& part, const Rows& tile, float* strip) {
    const HeadProblem& p = *part.problem;
    product(part.gradients[1], tile, backward(part, 0), nothing,
            [&](int64_t row, int64_t column, auto& sums, auto vectors) {
              VIDFAST_UNROLL
              for (int r = 0; r < kGroup; ++r) {
                VIDFAST_UNROLL
                for (int n = 0; n < vectors.value; ++n)
                  VF::store(strip + (row + r) * kMostColumns + n * VF::W, sums.at[r][n]);
              }
              if (row + kGroup < tile.computed) return;
              clear_uncounted(tile, strip, vectors.value * VF::W);
              write(p, p.grad_student, p.layers[0].into, part.begin + tile.first, tile.count, column,
                    vectors.value * VF::W, strip);
            });
  }

  // A bias's gradient over the tile.
  static void add_up(const HeadMatrix& gradient, const Rows& tile, int64_t channels, float* to) {
    for (int64_t column = 0; column < channels; column += VF::W) {
      Reg sum = VF::set1(0);
      for (int64_t r = 0; r < tile.computed; ++r)
        sum = VF::add(sum, Words::load(rows(gradient, tile.first + r) + column / Words::kValues));
      VF::store(to + column, sum);
    }
  }

  static void outer(const HeadPart& part, int64_t index, int64_t panel, int64_t block) {
    const HeadLayerPlan& layer = part.layers[index];
    const int64_t column = panel_begin(layer.into, panel), row = block * kHeadBlock;
    const int64_t count = whole_groups(part.count);
    with_vectors(layer.into, panel, [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      for (int64_t begin = 0; begin < count; begin += part.unit) {
        float* to = lane_of(part, index, part.begin + begin) + row * layer.into + column;
        add_block<N>(part, index, begin, std::min(begin + part.unit, count), row, column, to);
      }
    });
  }

  // A block of kHeadBlock rows, with the sums over the positions [begin, end) in two steps: what is added one by one
  // loses more, the more there is of it.
  template <int N>
  static void add_block(const HeadPart& part, int64_t index, int64_t begin, int64_t end, int64_t row, int64_t column,
                        float* to) {
    constexpr int kGroups = kHeadBlock / kGroup;
    const HeadMatrix& g = part.gradients[index + 1];
    const HeadMatrix& x = part.activations[index];
    const int64_t to_row = part.layers[index].into;
    Sums<N> totals[kGroups];
    for (Sums<N>& total : totals) clear(total);
    for (; begin < end; begin += kHeadDepth) {
      if (part.left_out != nullptr && part.left_out[begin / kHeadTile]) continue;
      const int64_t depth = std::min(kHeadDepth, end - begin) / Words::kValues;
      for (int group = 0; group < kGroups; ++group) {
        Sums<N> sums;
        clear(sums);
        multiply<Words, N>(pairs(g, begin) + row + group * kGroup, 1, g.pair, pairs(x, begin) + column, x.pair, depth,
                           sums);
        VIDFAST_UNROLL
        for (int r = 0; r < kGroup; ++r) {
          VIDFAST_UNROLL
          for (int n = 0; n < N; ++n) totals[group].at[r][n] = VF::add(totals[group].at[r][n], sums.at[r][n]);
        }
      }
    }
    for (int r = 0; r < kHeadBlock; ++r)
      for (int n = 0; n < N; ++n) {
        float* at = to + r * to_row + n * VF::W;
        VF::store(at, VF::add(VF::load(at), totals[r / kGroup].at[r % kGroup][n]));
      }
  }

  // A weight [out, into] as columns of a product: forward over its outputs, back over its inputs.
  static void pack(const HeadLayer& layer, bool forward, int64_t panel, float* to) {
    with_type(layer.weight_dtype, [&](auto type) { pack_as<decltype(type)>(layer, forward, panel, to); });
  }

  template <class P>
  static void pack_as(const HeadLayer& layer, bool forward, int64_t panel, float* to) {
    const P* weight = static_cast<const P*>(layer.weight);
    const int64_t columns = forward ? layer.out : layer.into, depth = forward ? layer.into : layer.out;
    const int64_t begin = panel_begin(padded(columns), panel), end = panel_begin(padded(columns), panel + 1);
    const auto value = [&](int64_t k, int64_t n) {
      if (k >= depth || n >= columns) return 0.0f;
      return VF::get(weight + (forward ? n * layer.into + k : k * layer.into + n));
    };
    const int64_t words = padded(depth) / Words::kValues;
    to += begin * words;
    for (int64_t k = 0; k < words; ++k)
      for (int64_t n = begin; n < end; ++n, ++to)
        *to = Words::word(value(k * Words::kValues, n), value(k * Words::kValues + Words::kValues - 1, n));
  }

  static constexpr HeadKernels table(const char* name) {
    return {name, Words::kValues == 2, panels, pack, tile, outer};
  }
};

// A word is a value, one of the module's: fp32, or rounded to 16 bits where the processor has no products of those.
template <class P>
struct Words32 {
  static constexpr int kValues = 1;
  static constexpr bool kRounds = !std::is_same_v<P, float>;
  static Reg multiply_add(Reg a, Reg b, Reg c) { return VF::multiply_add(a, b, c); }
  static Reg rounded(Reg a) {
    if constexpr (kRounds)
      return VF::rounded(static_cast<const P*>(nullptr), a);
    else
      return a;
  }
  static Reg load(const float* x) { return VF::load(x); }
  static Reg where_not_zero(Reg a, const float* x) { return VF::where_not_zero(a, VF::load(x)); }
  static float word(float a, float) {
    P value;
    VF::put(&value, a);
    return VF::get(&value);
  }
  static void clear(float* rows, float*, int64_t, int64_t column) { rows[column] = 0; }
  static void put(float* rows, int64_t row, float*, Reg first, Reg second) {
    VF::store(rows, rounded(first));
    VF::store(rows + row, rounded(second));
  }
};

inline const HeadKernels* with_words32(DType module, const char* name) {
  static const HeadKernels kernels[] = {HeadTasks<Words32<float>>::table(name), HeadTasks<Words32<bf16>>::table(name),
                                        HeadTasks<Words32<f16>>::table(name)};
  switch (module) {
    case DType::f32: return &kernels[0];
    case DType::bf16: return &kernels[1];
    case DType::f16: return &kernels[2];
    default: return nullptr;
  }
}

}  // namespace
}  // namespace vidfast::cpu
