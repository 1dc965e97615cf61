// One variance an element, where every position counts alike.
#include "heteroscedastic_sweep.h"

namespace vidfast::cuda {

void launch_heteroscedastic(const HeteroscedasticArgs& a, bool sums, cudaStream_t stream) {
  launch_heteroscedastic_of<false>(a, sums, stream);
}

}  // namespace vidfast::cuda
