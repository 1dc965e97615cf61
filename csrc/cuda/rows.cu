// Rows where every position counts alike.
#include "rows.h"

namespace vidfast::cuda {

void launch_rows(const Args& a, bool sums, cudaStream_t stream) { launch_rows_of<false>(a, sums, stream); }

}  // namespace vidfast::cuda
