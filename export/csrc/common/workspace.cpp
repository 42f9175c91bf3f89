// The memory of workspace.h. The pool is a stack of free buffers behind a mutex.
#include "common/workspace.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lit_binq {
namespace {

// Under AddressSanitizer every layer and every multiplication has memory of its own, of its exact size, so that
// whatever is read or written beyond it shows.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kOwnMemory = true;
#else
constexpr bool kOwnMemory = false;
#endif

struct Pool {
  std::mutex mutex;
  std::vector<WorkspaceBuffer> free;
};

// Never destroyed: threads of a runtime may still multiply while the process runs its exit handlers.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// Large pages of x86-64 and, mostly, of aarch64.
constexpr size_t kLargePage = size_t{2} << 20;
// A piece of memory for layers. Only what is written to becomes resident, large page by large page.
constexpr size_t kPiece = 16 * kLargePage;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

struct PieceDelete {
  void operator()(uint8_t* p) const noexcept { ::operator delete(p, std::align_val_t{kLargePage}); }
};

// The piece that is being filled. It belongs to its layers; the last one frees it.
struct Layers {
  std::mutex mutex;
  std::weak_ptr<uint8_t> piece;
  size_t used = 0, size = 0;
};

Layers& layers() {
  static Layers* const instance = new Layers;  // never destroyed, as the pool
  return *instance;
}

}  // namespace

LayerBytes allocate_for_layer(size_t size) {
  if (kOwnMemory) {
    AlignedBytes bytes = allocate_aligned(size);
    return LayerBytes(bytes.release(), AlignedDelete{});
  }
  size = round_up(std::max<size_t>(size, 1), kAlignment);
  Layers& l = layers();
  std::lock_guard<std::mutex> lock(l.mutex);
  LayerBytes piece = l.piece.lock();
  if (piece == nullptr || l.size - l.used < size) {
    const size_t fresh = std::max(kPiece, round_up(size, kLargePage));
    piece = LayerBytes(static_cast<uint8_t*>(::operator new(fresh, std::align_val_t{kLargePage})), PieceDelete{});
#if defined(__linux__)
    (void)madvise(piece.get(), fresh, MADV_HUGEPAGE);  // a wish: small pages work too
#endif
    l.piece = piece;
    l.used = 0;
    l.size = fresh;
  }
  uint8_t* const start = piece.get() + l.used;
  l.used += size;
  return LayerBytes(std::move(piece), start);
}

Workspace::Workspace(size_t size) {
  if (!kOwnMemory) {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (!pool().free.empty()) {
      buffer_ = std::move(pool().free.back());
      pool().free.pop_back();
    }
  }
  if (buffer_.size < size) {
    buffer_ = WorkspaceBuffer{};  // give the old one back before asking for more
    buffer_.bytes = allocate_aligned(size);
    buffer_.size = size;
  }
}

Workspace::~Workspace() {
  if (kOwnMemory) return;
  try {
    std::lock_guard<std::mutex> lock(pool().mutex);
    pool().free.push_back(std::move(buffer_));
  } catch (...) {
    // No room in the pool's list: the buffer is freed instead of kept.
  }
}

}  // namespace lit_binq
