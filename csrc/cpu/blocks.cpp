#include "blocks.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace vidfast::cpu {
namespace {

constexpr int64_t kPage = int64_t{64} << 10;  // the largest that processors take for granted
constexpr int64_t kLargePage = int64_t{2} << 20;
// Blocks from this size on are whole large pages; of smaller ones too much would go unused.
constexpr int64_t kWorthLargePages = int64_t{16} << 20;

struct Stretch {
  void* data;
  int64_t size;
};

int64_t page_of(int64_t bytes) { return bytes >= kWorthLargePages ? kLargePage : kPage; }

int64_t round_up(int64_t bytes) {
  const int64_t page = page_of(bytes);
  return std::max<int64_t>(1, (bytes + page - 1) / page) * page;
}

Stretch allocate(int64_t size) {
  const auto page = static_cast<std::align_val_t>(page_of(size));
  void* data = ::operator new(static_cast<size_t>(size), page);
#if defined(MADV_HUGEPAGE)
  if (page_of(size) == kLargePage)
    madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);  // 512 times fewer faults; no harm where refused
#endif
  return {data, size};
}

void release(const Stretch& s) { ::operator delete(s.data, static_cast<std::align_val_t>(page_of(s.size))); }

bool keeps() {
  const char* wanted = std::getenv("VIDFAST_KEEP_MEMORY");
  return wanted == nullptr || std::strcmp(wanted, "0") != 0;
}

// Holds, in use and idle together, never more than twice what was in use at once: enough for gradients of several
// layers that take turns, each half as large as the one before.
struct Store {
  const bool keep = keeps();
  std::mutex mutex;
  std::vector<Stretch> idle;  // the longest unused first
  BlockBytes bytes{0, 0, 0};

  // An idle stretch for `size`: the closest in size, of equals the last used. At most an eighth of it may go unused:
  // what is held for long would otherwise pin what it does not need.
  bool find(int64_t size, Stretch* found) {
    auto best = idle.end();
    for (auto s = idle.begin(); s != idle.end(); ++s)
      if (s->size >= size && s->size <= size + size / 8 && (best == idle.end() || s->size <= best->size)) best = s;
    if (best == idle.end()) return false;
    *found = *best;
    bytes.idle -= best->size;
    idle.erase(best);
    return true;
  }

  // What has to go, oldest first, until no more than `limit` is held.
  std::vector<Stretch> trim(int64_t limit) {
    size_t n = 0;
    for (; n < idle.size() && bytes.in_use + bytes.idle > limit; ++n) bytes.idle -= idle[n].size;
    std::vector<Stretch> gone(idle.begin(), idle.begin() + static_cast<std::ptrdiff_t>(n));
    idle.erase(idle.begin(), idle.begin() + static_cast<std::ptrdiff_t>(n));
    return gone;
  }
};

// Never destroyed: a gradient may outlive the interpreter. A forked child must not find the lock held by a thread that
// it does not have.
Store& store() {
  static Store& kept = []() -> Store& {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { store().mutex.lock(); }, [] { store().mutex.unlock(); }, [] { store().mutex.unlock(); });
#endif
    return *new Store;
  }();
  return kept;
}

void release_all(const std::vector<Stretch>& stretches) {
  for (const Stretch& s : stretches) release(s);
}

}  // namespace

Block::Block(int64_t bytes) : bytes_(bytes) {
  Store& s = store();
  const int64_t size = round_up(bytes);
  Stretch stretch{nullptr, 0};
  bool found = false;
  {
    const std::lock_guard<std::mutex> lock(s.mutex);
    found = s.find(size, &stretch);
  }
  if (!found) {
    try {
      stretch = allocate(size);
    } catch (const std::bad_alloc&) {
      release_idle_blocks();
      stretch = allocate(size);
    }
  }
  std::vector<Stretch> gone;
  {
    const std::lock_guard<std::mutex> lock(s.mutex);
    s.bytes.in_use += stretch.size;
    s.bytes.most = std::max(s.bytes.most, s.bytes.in_use);
    gone = s.trim(2 * s.bytes.most);
  }
  release_all(gone);
  data_ = stretch.data;
  size_ = stretch.size;
}

Block::~Block() {
  Store& s = store();
  std::vector<Stretch> gone{{data_, size_}};
  {
    const std::lock_guard<std::mutex> lock(s.mutex);
    s.bytes.in_use -= size_;
    if (s.keep) {
      s.bytes.idle += size_;
      s.idle.push_back(gone.front());
      gone = s.trim(2 * s.bytes.most);
    }
  }
  release_all(gone);
}

BlockBytes block_bytes() {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  return s.bytes;
}

void release_idle_blocks() {
  Store& s = store();
  std::vector<Stretch> gone;
  {
    const std::lock_guard<std::mutex> lock(s.mutex);
    gone = s.trim(0);
    s.bytes.most = s.bytes.in_use;
  }
  release_all(gone);
}

}  // namespace vidfast::cpu
