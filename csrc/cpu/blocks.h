// Memory of large gradients, kept from step to step. malloc gives large blocks back when they are freed, so that the
// next step's gradient is page faults again: they take several times as long as the kernel that writes it.
#pragma once

#include <cstdint>

namespace vidfast::cpu {

// A stretch of memory, on loan until the end of its life. Throws std::bad_alloc.
class Block {
 public:
  explicit Block(int64_t bytes);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }  // as asked for

 private:
  void* data_;
  int64_t bytes_, size_;
};

struct BlockBytes {
  int64_t in_use, idle;
  int64_t most;  // that were in use at once since idle ones were last released
};

BlockBytes block_bytes();

// Gives what is idle back to the system.
void release_idle_blocks();

}  // namespace vidfast::cpu
