// What lies between a regressor's products: ReLU, its gradient, and rounding to the dtype that a layer would give.
#include <algorithm>

#include "kernels.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

constexpr int64_t kPiece = 4096;              // stays in the first cache between the two steps
constexpr int64_t kFewest = 32768;            // for fewer elements no second thread
constexpr int64_t kRectifiedAsleep = 300000;  // what one thread does while another wakes up

// task(begin, count) for pieces of [0, n).
template <class Task>
void in_pieces(int64_t n, int threads, const Task& task) {
  threads = n < kFewest ? 1 : worth_waking(threads, n, kRectifiedAsleep);
  parallel_for((n + kPiece - 1) / kPiece, threads,
               [&](int64_t piece) { task(piece * kPiece, std::min(kPiece, n - piece * kPiece)); });
}

void round(void* x, DType dtype, DType rounded, int64_t n) {
  if (dtype == DType::f32 && rounded != dtype)
    active_kernels().round[static_cast<int>(rounded)](static_cast<float*>(x), n);
}

}  // namespace

void rectify(void* x, DType dtype, DType rounded, bool positive, int64_t n, int threads) {
  const int64_t size = size_of(dtype);
  in_pieces(n, threads, [&](int64_t begin, int64_t count) {
    char* at = static_cast<char*>(x) + begin * size;
    if (positive) active_kernels().positive[static_cast<int>(dtype)](at, count);
    round(at, dtype, rounded, count);
  });
}

void rectify_backward(const void* gradient, const void* activation, void* out, DType dtype, DType rounded, int64_t n,
                      int threads) {
  const int64_t size = size_of(dtype);
  in_pieces(n, threads, [&](int64_t begin, int64_t count) {
    const int64_t at = begin * size;
    char* to = static_cast<char*>(out) + at;
    active_kernels().where_positive[static_cast<int>(dtype)](static_cast<const char*>(gradient) + at,
                                                             static_cast<const char*>(activation) + at, to, count);
    round(to, dtype, rounded, count);
  });
}

}  // namespace vidfast::cpu
