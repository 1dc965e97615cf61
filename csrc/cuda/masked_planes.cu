// Planes with a weight for each position.
#include "planes.h"

namespace vidfast::cuda {

void launch_masked_planes(const Args& a, bool sums, cudaStream_t stream) { launch_planes_of<true>(a, sums, stream); }

}  // namespace vidfast::cuda
