// One variance an element, with a weight for each position.
#include "heteroscedastic_sweep.h"

namespace vidfast::cuda {

void launch_masked_heteroscedastic(const HeteroscedasticArgs& a, bool sums, cudaStream_t stream) {
  launch_heteroscedastic_of<true>(a, sums, stream);
}

}  // namespace vidfast::cuda
