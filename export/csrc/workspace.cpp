// The pool of workspace.h: a stack of free buffers behind a mutex.
#include "workspace.h"

#include <mutex>
#include <utility>
#include <vector>

namespace lit_binq {
namespace {

struct Pool {
  std::mutex mutex;
  std::vector<WorkspaceBuffer> free;
};

// Never destroyed: threads of a runtime may still multiply while the process runs its exit handlers.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

Workspace::Workspace(size_t size) {
  {
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
  try {
    std::lock_guard<std::mutex> lock(pool().mutex);
    pool().free.push_back(std::move(buffer_));
  } catch (...) {
    // No room in the pool's list: the buffer is freed instead of kept.
  }
}

}  // namespace lit_binq
