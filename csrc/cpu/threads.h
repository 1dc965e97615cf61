// OpenMP threads, borrowed at run time from the runtime that torch already uses.
#pragma once

#include <cstdint>

namespace vidfast::cpu {

const char* openmp_runtime();

namespace detail {
void run(void (*body)(void*, int, int), void* context, int threads);
}

// task(i) for i in [0, n), each thread a contiguous range. The split depends on the number of threads;
// what a task computes must not.
template <class Task>
void parallel_for(int64_t n, int threads, const Task& task) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  struct Job {
    int64_t n;
    const Task* task;
  } job{n, &task};
  detail::run(
      [](void* context, int thread, int team) {
        const Job& j = *static_cast<Job*>(context);
        const int64_t end = j.n * (thread + 1) / team;
        for (int64_t i = j.n * thread / team; i < end; ++i) (*j.task)(i);
      },
      &job, threads);
}

}  // namespace vidfast::cpu
