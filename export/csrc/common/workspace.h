// Aligned memory, and a pool of it for the tables of a multiplication. Touches the heap only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace lit_binq {

// A cache line, and twice an AVX2 register.
constexpr size_t kAlignment = 64;

struct AlignedDelete {
  void operator()(uint8_t* p) const noexcept { ::operator delete(p, std::align_val_t{kAlignment}); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], AlignedDelete>;

// ceil(a / b) for a from 0 and b from 1, whatever their size.
constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Throws std::bad_alloc.
inline AlignedBytes allocate_aligned(size_t size) {
  return AlignedBytes(static_cast<uint8_t*>(::operator new(size, std::align_val_t{kAlignment})));
}

// Memory for what lives as long as a layer and is read from one end to the other: codes. Shared by the layers that were
// made one after the other, so that even small ones lie in large pages: without them a third of the time of reading a
// 2 MB layer once goes into looking up its 512 small pages. A piece of it is given back when all its layers are gone.
using LayerBytes = std::shared_ptr<uint8_t>;
LayerBytes allocate_for_layer(size_t size);  // aligned to kAlignment; throws std::bad_alloc

struct WorkspaceBuffer {
  AlignedBytes bytes;
  size_t size = 0;
};

// Memory borrowed from a process-wide pool for the time of one multiplication. Concurrent and nested calls get
// different buffers; a session in its stride allocates nothing, since buffers are kept for the life of the process:
// as many as there were calls at once, each as large as the largest panel of tables (multiply.cpp bounds it).
class Workspace {
 public:
  explicit Workspace(size_t size);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  uint8_t* data() { return buffer_.bytes.get(); }

 private:
  WorkspaceBuffer buffer_;
};

}  // namespace lit_binq
