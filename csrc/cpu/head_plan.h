// The plan of a head: its units of positions, its sums, and where everything is in memory.
#pragma once

#include <vector>

#include "head_kernels.h"

namespace vidfast::cpu {

// Hands out memory in whole cache lines; without memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* at = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Sums over units of positions: [lanes] of each, added up in the order of lanes at last.
struct LaneSums {
  double* sum_sq;               // [lanes, C, filled up]
  double* biases[kMostLayers];  // [lanes, out] or nullptr
};

struct HeadPlan {
  const HeadKernels& kernels;
  int64_t positions;  // of the whole
  int64_t unit, lanes;
  // Threads that take lanes of their own, each with memory for a unit: no thread reads what another has written.
  // 1: all threads share each unit, or several at once.
  int lane_threads;
  std::vector<HeadPart> parts;  // one for each of `lane_threads`
  int64_t part_positions;       // a multiple of unit: what a part has memory for
  float* scale;
  LaneSums sums;
  int64_t bytes;

  HeadPlan(const HeadProblem& p, void* memory, int threads);

 private:
  int64_t row(int64_t channels) const;
  int64_t pair(int64_t channels) const;
  int64_t words_of_matrix(int64_t channels) const;
  int64_t words_of_position(const HeadProblem& p) const;
  HeadMatrix matrix(Arena& arena, int64_t channels) const;
  void take_weights(HeadPart& part, Arena& arena) const;
  void take_activations(HeadPart& part, Arena& arena) const;
};

}  // namespace vidfast::cpu
