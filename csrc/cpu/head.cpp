// The driver of a head: what is done in which order, and what is shared among threads.
//
// A unit of the positions goes through all layers, the loss, and back, tile by tile, while its activations are in the
// second cache; then the weights' gradients take what it adds. The loss is a sum over positions, so nothing waits for
// the whole batch and no activation is stored for it. Sums are made in lanes: a lane's over its units, in their order,
// and then over the lanes, in theirs. Units and lanes follow from shapes and the dtype: no number depends on the
// threads, or on which other gradients are wanted.
#include <algorithm>
#include <vector>

#include "channels.h"
#include "head_plan.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

// Multiply-adds that one thread does while another wakes up.
constexpr int64_t kWakeupMultiplies = int64_t{4} << 20;

float rounded(double x, DType dtype) {
  alignas(double) char value[sizeof(double)];
  store_scalar(value, dtype, 0, x);
  return static_cast<float>(load_scalar(value, dtype, 0));
}

void pack(const HeadProblem& p, const HeadPlan& plan, int threads) {
  for (int l = 0; l < p.layer_count; ++l) {
    const HeadLayerPlan& to = plan.parts[0].layers[l];
    const HeadLayer& layer = p.layers[l];
    parallel_for(plan.kernels.panels(to.out), threads,
                 [&](int64_t panel) { plan.kernels.pack(layer, true, panel, to.forward); });
    if (to.backward != nullptr)
      parallel_for(plan.kernels.panels(to.into), threads,
                   [&](int64_t panel) { plan.kernels.pack(layer, false, panel, to.backward); });
    if (to.bias != nullptr)
      for (int64_t c = 0; c < to.out; ++c) {
        to.bias[c] = c < layer.out ? rounded(load_scalar(layer.bias, layer.bias_dtype, c), p.module) : 0.0f;
      }
  }
}

// The blocks of all weights' gradients, one after the other.
struct Blocks {
  struct Layer {
    int64_t layer, panels, blocks;
  };
  std::vector<Layer> layers;
  int64_t count = 0;

  explicit Blocks(const HeadPlan& plan) {
    const HeadPart& part = plan.parts[0];
    for (int l = 0; l < part.problem->layer_count; ++l)
      if (part.problem->layers[l].grad_weight != nullptr) {
        layers.push_back({l, plan.kernels.panels(part.layers[l].into), part.layers[l].out / kHeadBlock});
        count += layers.back().panels * layers.back().blocks;
      }
  }

  void run(const HeadPlan& plan, const HeadPart& part, int64_t task) const {
    for (const Layer& layer : layers) {
      if (task < layer.panels * layer.blocks) {
        plan.kernels.outer(part, layer.layer, task / layer.blocks, task % layer.blocks);
        return;
      }
      task -= layer.panels * layer.blocks;
    }
  }
};

// Everything of a part, by so many threads; what its tiles have summed is added to the sums of their lanes.
void compute(const HeadPlan& plan, const HeadPart& part, const Blocks& blocks, int threads) {
  const int64_t tiles = round_up(part.count, kHeadTile) / kHeadTile;
  parallel_for(tiles, threads, [&](int64_t tile) { plan.kernels.tile(part, tile); });
  if (blocks.count > 0) parallel_for(blocks.count, threads, [&](int64_t task) { blocks.run(plan, part, task); });
  const HeadProblem& p = *part.problem;
  const int64_t wide = padded(p.channels);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t lane = (part.begin + tile * kHeadTile) / plan.unit % plan.lanes;
    for (int64_t c = 0; c < wide; ++c) plan.sums.sum_sq[lane * wide + c] += part.sum_sq[tile * wide + c];
    for (int l = 0; l < p.layer_count; ++l) {
      if (plan.sums.biases[l] == nullptr) continue;
      const int64_t out = part.layers[l].out;
      for (int64_t c = 0; c < out; ++c)
        plan.sums.biases[l][lane * out + c] += static_cast<double>(part.layers[l].bias_sums[tile * out + c]);
    }
  }
}

// Each thread takes lanes of its own, unit by unit.
void compute_by_lanes(HeadPlan& plan, const Blocks& blocks) {
  parallel_for(plan.lane_threads, plan.lane_threads, [&](int64_t thread) {
    HeadPart& part = plan.parts[thread];
    for (int64_t lane = plan.lanes * thread / plan.lane_threads; lane < plan.lanes * (thread + 1) / plan.lane_threads;
         ++lane)
      for (part.begin = lane * plan.unit; part.begin < plan.positions; part.begin += plan.lanes * plan.unit) {
        part.count = std::min(plan.unit, plan.positions - part.begin);
        compute(plan, part, blocks, 1);
      }
  });
}

// All threads share each part.
void compute_together(HeadPlan& plan, const Blocks& blocks, int threads) {
  HeadPart& part = plan.parts[0];
  for (part.begin = 0; part.begin < plan.positions; part.begin += plan.part_positions) {
    part.count = std::min(plan.part_positions, plan.positions - part.begin);
    compute(plan, part, blocks, threads);
  }
}

void clear_sums(const HeadProblem& p, const HeadPlan& plan) {
  const HeadPart& part = plan.parts[0];
  std::fill_n(plan.sums.sum_sq, plan.lanes * padded(p.channels), 0.0);
  for (int l = 0; l < p.layer_count; ++l) {
    const int64_t size = part.layers[l].out * part.layers[l].into;
    if (part.first_lane[l] != nullptr) {
      std::fill_n(part.first_lane[l], size, 0.0f);
      std::fill_n(part.other_lanes[l], (plan.lanes - 1) * size, 0.0f);
    }
    if (plan.sums.biases[l] != nullptr) std::fill_n(plan.sums.biases[l], plan.lanes * part.layers[l].out, 0.0);
  }
}

// sums [lanes, n] -> the first of them holds all.
template <class T>
void add_lanes(T* first, const T* others, int64_t lanes, int64_t n) {
  for (int64_t lane = 1; lane < lanes; ++lane)
    for (int64_t i = 0; i < n; ++i) first[i] += others[(lane - 1) * n + i];
}

void add_lanes(const HeadProblem& p, const HeadPlan& plan) {
  const HeadPart& part = plan.parts[0];
  const int64_t wide = padded(p.channels);
  add_lanes(plan.sums.sum_sq, plan.sums.sum_sq + wide, plan.lanes, wide);
  for (int l = 0; l < p.layer_count; ++l) {
    const int64_t out = part.layers[l].out, into = part.layers[l].into;
    if (part.first_lane[l] != nullptr) {
      add_lanes(part.first_lane[l], part.other_lanes[l], plan.lanes, out * into);
      if (part.first_lane[l] != p.layers[l].grad_weight)
        for (int64_t o = 0; o < p.layers[l].out; ++o)
          std::copy_n(part.first_lane[l] + o * into, p.layers[l].into, p.layers[l].grad_weight + o * p.layers[l].into);
    }
    if (plan.sums.biases[l] == nullptr) continue;
    add_lanes(plan.sums.biases[l], plan.sums.biases[l] + out, plan.lanes, out);
    for (int64_t c = 0; c < p.layers[l].out; ++c) p.layers[l].grad_bias[c] = static_cast<float>(plan.sums.biases[l][c]);
  }
}

// Threads that are worth waking.
int useful_threads(const HeadProblem& p, int threads) {
  int64_t multiplies = 0;
  for (int l = 0; l < p.layer_count; ++l) multiplies += 3 * p.layers[l].into * p.layers[l].out;
  return worth_waking(threads, multiplies * p.batch * p.positions, kWakeupMultiplies);
}

}  // namespace

const char* head_instructions(DType module, int64_t layer_count) {
  const HeadKernels* kernels = head_kernels(module);
  return layer_count <= kMostLayers && kernels != nullptr ? kernels->name : nullptr;
}

int64_t head_workspace_bytes(const HeadProblem& p, int threads) {
  return HeadPlan(p, nullptr, useful_threads(p, threads)).bytes;
}

void head(const HeadProblem& p, float* loss, void* workspace, int threads) {
  threads = useful_threads(p, threads);
  HeadPlan plan(p, workspace, threads);
  const double values = p.weights != nullptr ? p.values : static_cast<double>(plan.positions);
  const Channels channels(p.alpha, p.alpha_dtype, p.channels, p.eps, values, threads);
  for (int64_t c = 0; c < padded(p.channels); ++c)
    plan.scale[c] = c < p.channels ? static_cast<float>(p.k / channels.values[c].variance) : 0.0f;
  pack(p, plan, threads);
  clear_sums(p, plan);
  const Blocks blocks(plan);
  if (plan.lane_threads > 1)
    compute_by_lanes(plan, blocks);
  else
    compute_together(plan, blocks, threads);
  add_lanes(p, plan);
  *loss = static_cast<float>(channels.loss(plan.sums.sum_sq, p.k, false));
  if (p.grad_alpha == nullptr) return;
  for (int64_t c = 0; c < p.channels; ++c)
    p.grad_alpha[c] = p.k * channel_grad_alpha(channels.values[c], plan.sums.sum_sq[c], channels.m);
}

}  // namespace vidfast::cpu
