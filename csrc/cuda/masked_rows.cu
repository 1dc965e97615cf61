// Rows with a weight for each position.
#include "rows.h"

namespace vidfast::cuda {

void launch_masked_rows(const Args& a, bool sums, cudaStream_t stream) { launch_rows_of<true>(a, sums, stream); }

}  // namespace vidfast::cuda
