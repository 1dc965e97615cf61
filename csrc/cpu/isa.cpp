// Which instruction set runs: the best that the processor has, or VIDFAST_CPU_ISA=baseline|avx2|avx512|avx512_bf16.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "head_kernels.h"
#include "kernels.h"

namespace vidfast::cpu {
namespace {

const InstructionSet* by_name(const char* name) {
  if (strcmp(name, "baseline") == 0) return &baseline_kernels();
#ifdef VIDFAST_X86
  if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return &avx2_kernels();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (strcmp(name, "avx512") == 0 && avx512) return &avx512_kernels();
#ifdef VIDFAST_AVX512_BF16
  if (strcmp(name, "avx512_bf16") == 0 && avx512 && __builtin_cpu_supports("avx512bf16")) return &avx512_bf16_kernels();
#endif
#endif
  return nullptr;
}

const InstructionSet* best() {
  if (const char* wanted = std::getenv("VIDFAST_CPU_ISA"))
    if (const InstructionSet* set = by_name(wanted)) return set;
  for (const char* name : {"avx512_bf16", "avx512", "avx2"})
    if (const InstructionSet* set = by_name(name)) return set;
  return &baseline_kernels();
}

std::atomic<const InstructionSet*>& active() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

}  // namespace

const HeadKernels* head_kernels(DType module) { return active_kernels().head(module); }

const InstructionSet& active_kernels() { return *active().load(std::memory_order_relaxed); }

const char* isa() { return active_kernels().name; }

bool select_isa(const char* name) {
  const InstructionSet* set = by_name(name);
  if (set == nullptr) return false;
  active().store(set, std::memory_order_relaxed);
  return true;
}

}  // namespace vidfast::cpu
