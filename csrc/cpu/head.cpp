// The driver of a head: memory, parts of the positions, and what is shared among threads.
//
// A part of the positions goes through all layers, the loss, and back, tile by tile, while its activations are in the
// second cache; then the weights' gradients take what the part adds, each thread other blocks of them. The loss is a
// sum over positions, so nothing waits for the whole batch and no activation is stored for it. How many positions a
// part has depends on threads, no number does: a tile's sums are added in the order of tiles, a weight's gradient takes
// kHeadDepth positions after the other.
#include <algorithm>
#include <vector>

#include "channels.h"
#include "half.h"
#include "head_kernels.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

// What a part's activations and gradients may take: with a weight's panels they stay in a second-level cache.
constexpr int64_t kPartBytes = int64_t{1} << 20;
// How often a weight's gradient is added to, about: each time it is rounded.
constexpr int64_t kMostAdded = 1024;
constexpr int64_t kLineWords = 16;

int64_t whole_depths(int64_t positions) { return std::max<int64_t>(positions / kHeadDepth, 1) * kHeadDepth; }

// Hands out memory in whole cache lines; without memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* at = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

struct Plan {
  const HeadKernels& kernels;
  HeadPart part;
  int64_t positions;       // of the whole
  int64_t part_positions;  // a multiple of part.together
  float* scale;
  int64_t bytes;

  Plan(const HeadProblem& p, void* memory, int threads)
      : kernels(*head_kernels(p.module)), part(), positions(p.batch * p.positions) {
    part.problem = &p;
    part.lowest = p.layer_count + 1;
    for (int l = p.layer_count - 1; l >= 0; --l)
      if (p.layers[l].grad_weight != nullptr || p.layers[l].grad_bias != nullptr) part.lowest = l + 1;
    if (p.grad_student.data != nullptr) part.lowest = 0;
    const int64_t fitting = kPartBytes / (4 * words(p));
    part.together = whole_depths(std::min(std::max(fitting, positions / kMostAdded), positions));
    // enough tiles for every thread, and always whole groups of these: no sum depends on threads
    const auto whole = [&](int64_t n) { return (n + part.together - 1) / part.together * part.together; };
    part_positions = std::min(whole(threads * kHeadTile), whole(positions));
    take(p, memory);
  }

 private:
  // Whether the gradient of what goes into layer l, or of the mean, is stored.
  bool has_gradient(int64_t l) const { return l >= 1 && l >= part.lowest; }

  int64_t words(const HeadProblem& p) const {
    int64_t words = 0;
    for (int l = 0; l < p.layer_count; ++l) {
      words += of_matrix(padded(p.layers[l].into));
      if (has_gradient(l + 1)) words += of_matrix(padded(p.layers[l].out));
    }
    return words;
  }

  // Rows that lie a multiple of 4 KiB apart would share the sets of a cache.
  int64_t row(int64_t channels) const { return kernels.words(channels) + kLineWords; }
  int64_t pair(int64_t channels) const { return channels + kLineWords; }
  int64_t of_matrix(int64_t channels) const { return row(channels) + (kernels.pairs ? pair(channels) / 2 : 0); }

  HeadMatrix matrix(Arena& arena, int64_t channels) const {
    HeadMatrix m;
    m.row = row(channels);
    m.rows = arena.take<float>(part_positions * m.row);
    m.pair = pair(channels);
    m.pairs = kernels.pairs ? arena.take<float>(part_positions / 2 * m.pair) : m.rows;
    return m;
  }

  void take(const HeadProblem& p, void* memory) {
    Arena arena(memory);
    const int64_t tiles = part_positions / kHeadTile;
    for (int l = 0; l < p.layer_count; ++l) {
      HeadLayerPlan& layer = part.layers[l];
      layer.into = padded(p.layers[l].into);
      layer.out = padded(p.layers[l].out);
      layer.forward = arena.take<float>(kernels.words(layer.into) * layer.out);
      if (l >= part.lowest) layer.backward = arena.take<float>(kernels.words(layer.out) * layer.into);
      if (p.layers[l].bias != nullptr) layer.bias = arena.take<float>(layer.out);
      if (p.layers[l].grad_bias != nullptr) layer.bias_sums = arena.take<float>(tiles * layer.out);
      part.activations[l] = matrix(arena, layer.into);
      if (has_gradient(l + 1)) part.gradients[l + 1] = matrix(arena, layer.out);
    }
    const int64_t channels = padded(p.channels);
    scale = arena.take<float>(channels);
    part.scale = scale;
    part.sum_sq = arena.take<double>(tiles * channels);
    bytes = arena.used();
  }
};

float rounded(double x, DType dtype) {
  const float value = static_cast<float>(x);
  if (dtype == DType::bf16) return to_float(to_bf16(value));
  return dtype == DType::f16 ? to_float(to_f16(value)) : value;
}

void pack(const HeadProblem& p, const Plan& plan, int threads) {
  for (int l = 0; l < p.layer_count; ++l) {
    const HeadLayerPlan& to = plan.part.layers[l];
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

  Blocks(const HeadProblem& p, const Plan& plan) {
    for (int l = 0; l < p.layer_count; ++l)
      if (p.layers[l].grad_weight != nullptr) {
        layers.push_back({l, plan.kernels.panels(plan.part.layers[l].into), plan.part.layers[l].out / kHeadBlock});
        count += layers.back().panels * layers.back().blocks;
      }
  }

  void run(const Plan& plan, int64_t task) const {
    for (const Layer& layer : layers) {
      if (task < layer.panels * layer.blocks) {
        plan.kernels.outer(plan.part, layer.layer, task / layer.blocks, task % layer.blocks);
        return;
      }
      task -= layer.panels * layer.blocks;
    }
  }
};

}  // namespace

bool head_runs(DType module) { return head_kernels(module) != nullptr; }

int64_t head_workspace_bytes(const HeadProblem& p, int threads) { return Plan(p, nullptr, threads).bytes; }

void head(const HeadProblem& p, float* loss, void* workspace, int threads) {
  Plan plan(p, workspace, threads);
  HeadPart& part = plan.part;
  const int64_t channels = p.channels, wide = padded(channels);
  const Channels of(p.alpha, p.alpha_dtype, channels, p.eps, static_cast<double>(plan.positions), threads);
  for (int64_t c = 0; c < wide; ++c)
    plan.scale[c] = c < channels ? static_cast<float>(p.k / of.values[c].variance) : 0.0f;
  pack(p, plan, threads);
  const Blocks blocks(p, plan);
  std::vector<double> sum_sq(channels);
  std::vector<double> of_bias[kMostLayers];
  for (int l = 0; l < p.layer_count; ++l) of_bias[l].resize(part.layers[l].bias_sums != nullptr ? p.layers[l].out : 0);

  for (part.begin = 0; part.begin < plan.positions; part.begin += plan.part_positions) {
    part.count = std::min(plan.part_positions, plan.positions - part.begin);
    const int64_t tiles = (part.count + kHeadTile - 1) / kHeadTile;
    parallel_for(tiles, threads, [&](int64_t tile) { plan.kernels.tile(part, tile); });
    if (blocks.count > 0) parallel_for(blocks.count, threads, [&](int64_t task) { blocks.run(plan, task); });
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t c = 0; c < channels; ++c) sum_sq[c] += part.sum_sq[tile * wide + c];
      for (int l = 0; l < p.layer_count; ++l)
        for (size_t c = 0; c < of_bias[l].size(); ++c)
          of_bias[l][c] += static_cast<double>(part.layers[l].bias_sums[tile * part.layers[l].out + c]);
    }
  }

  *loss = static_cast<float>(of.loss(sum_sq.data(), p.k, p.full));
  if (p.grad_alpha == nullptr) return;
  for (int64_t c = 0; c < channels; ++c) p.grad_alpha[c] = p.k * channel_grad_alpha(of.values[c], sum_sq[c], of.m);
  for (int l = 0; l < p.layer_count; ++l)
    for (size_t c = 0; c < of_bias[l].size(); ++c) p.layers[l].grad_bias[c] = static_cast<float>(of_bias[l][c]);
}

}  // namespace vidfast::cpu
