// M and k of a call whose positions have weights, or whose weight is a tensor.
#include <algorithm>
#include <vector>

#include "channels.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

// A task's positions: the sum of their bytes fits 32 bits.
constexpr int64_t kBlock = 16384;
// What one thread adds up while another wakes up.
constexpr int64_t kAddedAsleep = 400000;

double sum_of(const uint8_t* x, int64_t n) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// In so many sums side by side, which compilers make vectors of.
template <class P>
double sum_of(const P* x, int64_t n) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; n - i >= kLanes; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(x[i + lane]);
  for (; i < n; ++i) lanes[i % kLanes] += static_cast<double>(x[i]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <class P>
double sum_in_blocks(const void* positions, int64_t count, int threads) {
  const P* x = static_cast<const P*>(positions);
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
  parallel_for(blocks, worth_waking(threads, count, kAddedAsleep), [&](int64_t block) {
    sums[block] = sum_of(x + block * kBlock, std::min(kBlock, count - block * kBlock));
  });
  double sum = 0;
  for (const double one : sums) sum += one;
  return sum;
}

}  // namespace

void total(const Total& t, double* totals, int threads) {
  double m = static_cast<double>(t.count);
  if (t.positions != nullptr)
    m = t.positions_are_bytes ? sum_in_blocks<uint8_t>(t.positions, t.count, threads)
        : t.positions_are_f64 ? sum_in_blocks<double>(t.positions, t.count, threads)
                              : sum_in_blocks<float>(t.positions, t.count, threads);
  double k = t.k;
  if (t.factor != nullptr) k *= load_scalar(t.factor, t.factor_dtype, 0);
  if (t.channels != 0) k /= m * static_cast<double>(t.channels);
  if (m == 0) k = 0;  // whatever the factor is: one over nothing, say
  totals[0] = m;
  totals[1] = k;
}

}  // namespace vidfast::cpu
