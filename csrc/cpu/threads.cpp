// Linking a second OpenMP runtime would give the process a second pool of spinning threads that fights torch's
// for the cores. So none is linked: the one that libtorch_cpu was linked with is found in the process and its
// GOMP_parallel called (libomp and libiomp5 offer it too). Without any, the work runs on the calling thread.
#include "threads.h"

#include <dlfcn.h>
#include <strings.h>
#ifdef __linux__
#include <link.h>
#endif

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>

namespace vidfast::cpu {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  std::string name = "none";

  bool take(void* handle) {
    if (handle == nullptr) return false;
    void* entry = dlsym(handle, "GOMP_parallel");
    thread_num = reinterpret_cast<int (*)()>(dlsym(handle, "omp_get_thread_num"));
    num_threads = reinterpret_cast<int (*)()>(dlsym(handle, "omp_get_num_threads"));
    if (entry == nullptr || thread_num == nullptr || num_threads == nullptr) return false;
    parallel = reinterpret_cast<decltype(parallel)>(entry);
    Dl_info where;
    if (dladdr(entry, &where) != 0 && where.dli_fname != nullptr) {
      const char* slash = strrchr(where.dli_fname, '/');
      name = slash == nullptr ? where.dli_fname : slash + 1;
    }
    return true;
  }
};

#ifdef __linux__
struct Loaded {
  std::string torch, openmp;
};

int visit(dl_phdr_info* info, size_t, void* data) {
  auto* found = static_cast<Loaded*>(data);
  const char* path = info->dlpi_name;
  if (path == nullptr) return 0;
  const char* slash = strrchr(path, '/');
  const char* base = slash == nullptr ? path : slash + 1;
  if (strncmp(base, "libtorch_cpu.so", 15) == 0) found->torch = path;
  for (const char* name : {"libgomp", "libomp", "libiomp5"})
    if (found->openmp.empty() && strncmp(base, name, strlen(name)) == 0) found->openmp = path;
  return 0;
}
#endif

OpenMP find() {
  OpenMP omp;
#ifdef __linux__
  Loaded found;
  dl_iterate_phdr(visit, &found);
  // Through libtorch_cpu's handle dlsym searches its dependencies: torch's own runtime, whatever else is loaded.
  for (const std::string& path : {found.torch, found.openmp})
    if (!path.empty() && omp.take(dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD))) return omp;
  if (omp.take(dlopen("libgomp.so.1", RTLD_LAZY | RTLD_LOCAL))) return omp;
#else
  if (omp.take(RTLD_DEFAULT)) return omp;
#endif
  return OpenMP{};
}

const OpenMP& runtime() {
  static const OpenMP omp = find();
  return omp;
}

struct Region {
  void (*body)(void*, int, int);
  void* context;
};

void enter(void* data) {
  const auto* region = static_cast<Region*>(data);
  region->body(region->context, runtime().thread_num(), runtime().num_threads());
}

}  // namespace

bool threads_sleep() {
  // read once, as the OpenMP runtime does
  static const bool sleep = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy != nullptr && strcasecmp(policy, "passive") == 0;
  }();
  return sleep;
}

const char* openmp_runtime() { return runtime().name.c_str(); }

namespace detail {
void run(void (*body)(void*, int, int), void* context, int threads) {
  if (runtime().parallel == nullptr) {
    body(context, 0, 1);
    return;
  }
  Region region{body, context};
  runtime().parallel(enter, &region, static_cast<unsigned>(threads), 0);
}
}  // namespace detail

}  // namespace vidfast::cpu
