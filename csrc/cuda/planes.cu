// Planes where every position counts alike.
#include "planes.h"

namespace vidfast::cuda {

void launch_planes(const Args& a, bool sums, cudaStream_t stream) { launch_planes_of<false>(a, sums, stream); }

}  // namespace vidfast::cuda
