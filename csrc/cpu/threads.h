// OpenMP threads, borrowed at run time from the runtime that torch already uses.
#pragma once

#include <cstdint>

namespace vidfast::cpu {

const char* openmp_runtime();

// Whether threads sleep while they wait (OMP_WAIT_POLICY=passive): waking one then takes some 80 us.
bool threads_sleep();

// How many threads a region deserves: one where the others would not be awake before it was done. `work` and `asleep`
// are in elements: what the region has, and what one thread does while another wakes. Of T threads the break-even
// is at asleep * T / (T - 1).
inline int worth_waking(int threads, int64_t work, int64_t asleep) {
  return threads > 1 && threads_sleep() && work * (threads - 1) < asleep * threads ? 1 : threads;
}

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
