#include "head_plan.h"

#include <algorithm>

namespace vidfast::cpu {
namespace {

// What a unit's activations and gradients may take: with a weight's panels they stay in a second-level cache.
constexpr int64_t kUnitBytes = int64_t{512} << 10;
// How often a weight's gradient is added to, about: each time it is rounded.
constexpr int64_t kMostAdditions = 1024;
// What sums of weights' gradients may take, and how many there are at most.
constexpr int64_t kLaneBytes = int64_t{1} << 20;
constexpr int64_t kMostLanes = 32;
constexpr int64_t kLineWords = 16;

int64_t power_of_two_below(int64_t n) {
  int64_t power = 1;
  while (power * 2 <= n) power *= 2;
  return power;
}

// Of `gradients`, the lowest that is needed.
int64_t lowest(const HeadProblem& p) {
  if (p.grad_student.data != nullptr) return 0;
  for (int l = 0; l < p.layer_count; ++l)
    if (p.layers[l].grad_weight != nullptr || p.layers[l].grad_bias != nullptr) return l + 1;
  return p.layer_count + 1;
}

bool has_gradient(const HeadPart& part, int64_t l) { return l >= 1 && l >= part.lowest; }

}  // namespace

// Rows a multiple of 4 KiB from each other would share the sets of a cache.
int64_t HeadPlan::row(int64_t channels) const { return kernels.words(channels) + kLineWords; }

int64_t HeadPlan::pair(int64_t channels) const { return channels + kLineWords; }

int64_t HeadPlan::words_of_matrix(int64_t channels) const {
  return row(channels) + (kernels.pairs ? pair(channels) / 2 : 0);
}

// Of all activations and their gradients, wanted or not.
int64_t HeadPlan::words_of_position(const HeadProblem& p) const {
  int64_t words = 0;
  for (int l = 0; l < p.layer_count; ++l)
    words += words_of_matrix(padded(p.layers[l].into)) + words_of_matrix(padded(p.layers[l].out));
  return words;
}

HeadMatrix HeadPlan::matrix(Arena& arena, int64_t channels) const {
  HeadMatrix m;
  m.row = row(channels);
  m.rows = arena.take<float>(part_positions * m.row);
  m.pair = pair(channels);
  m.pairs = kernels.pairs ? arena.take<float>(part_positions / 2 * m.pair) : m.rows;
  return m;
}

// What all parts share.
void HeadPlan::take_weights(HeadPart& part, Arena& arena) const {
  const HeadProblem& p = *part.problem;
  for (int l = 0; l < p.layer_count; ++l) {
    HeadLayerPlan& layer = part.layers[l];
    layer.forward = arena.take<float>(kernels.words(layer.into) * layer.out);
    if (l >= part.lowest) layer.backward = arena.take<float>(kernels.words(layer.out) * layer.into);
    if (p.layers[l].bias != nullptr) layer.bias = arena.take<float>(layer.out);
    if (p.layers[l].grad_weight == nullptr) continue;
    const bool filled_up = layer.out != p.layers[l].out || layer.into != p.layers[l].into;
    part.first_lane[l] = filled_up ? arena.take<float>(layer.out * layer.into) : p.layers[l].grad_weight;
    part.other_lanes[l] = arena.take<float>((lanes - 1) * layer.out * layer.into);
  }
}

void HeadPlan::take_activations(HeadPart& part, Arena& arena) const {
  const HeadProblem& p = *part.problem;
  const int64_t tiles = part_positions / kHeadTile;
  for (int l = 0; l < p.layer_count; ++l) {
    HeadLayerPlan& layer = part.layers[l];
    if (p.layers[l].grad_bias != nullptr) layer.bias_sums = arena.take<float>(tiles * layer.out);
    part.activations[l] = matrix(arena, layer.into);
    if (has_gradient(part, l + 1)) part.gradients[l + 1] = matrix(arena, layer.out);
  }
  part.sum_sq = arena.take<double>(tiles * padded(p.channels));
  if (p.weights != nullptr) part.left_out = arena.take<bool>(tiles);
}

HeadPlan::HeadPlan(const HeadProblem& p, void* memory, int threads)
    : kernels(*p.kernels), positions(p.batch * p.positions), sums() {
  HeadPart part{};
  part.problem = &p;
  part.lowest = lowest(p);
  int64_t weight_bytes = 0;
  for (int l = 0; l < p.layer_count; ++l) {
    part.layers[l].into = padded(p.layers[l].into);
    part.layers[l].out = padded(p.layers[l].out);
    weight_bytes += 4 * part.layers[l].into * part.layers[l].out;
  }
  // Which sums there are, and in which order they are added up: of shapes and the dtype alone.
  const int64_t fitting = std::max(kUnitBytes / (4 * words_of_position(p)), positions / kMostAdditions);
  unit = std::clamp(fitting / kHeadDepth * kHeadDepth, kHeadDepth, round_up(positions, kHeadDepth));
  const int64_t units = round_up(positions, unit) / unit;
  lanes = power_of_two_below(std::min({kLaneBytes / std::max<int64_t>(weight_bytes, 1), kMostLanes, units}));
  part.unit = unit, part.lanes = lanes;

  // Lanes are shared evenly, or threads share units.
  const bool evenly = lanes % threads == 0 || lanes >= 4 * threads;
  lane_threads = threads > 1 && evenly && units >= 4 * threads ? threads : 1;
  part_positions = lane_threads > 1 ? unit : std::min(round_up(threads * kHeadTile, unit), round_up(positions, unit));

  Arena arena(memory);
  take_weights(part, arena);
  const int64_t channels = padded(p.channels);
  scale = arena.take<float>(channels);
  part.scale = scale;
  sums.sum_sq = arena.take<double>(lanes * channels);
  for (int l = 0; l < p.layer_count; ++l)
    if (p.layers[l].grad_bias != nullptr) sums.biases[l] = arena.take<double>(lanes * part.layers[l].out);
  for (int thread = 0; thread < lane_threads; ++thread) {
    parts.push_back(part);
    take_activations(parts.back(), arena);
  }
  bytes = arena.used();
}

}  // namespace vidfast::cpu
