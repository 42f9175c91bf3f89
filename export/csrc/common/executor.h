// Who runs the tasks of a multiplication, and in which mode.
#pragma once

#include <cstddef>

namespace lit_binq {

enum class Mode { kLut = 0, kExact = 1 };

// Runs independent tasks, here or on somebody's threads.
class Executor {
 public:
  virtual ~Executor() = default;
  // Calls task(argument, i) once for each i < tasks, in any order, and returns when all are done. `batches` is the
  // number of pieces worth handing out. Tasks never throw.
  virtual void run(size_t tasks, size_t batches, void (*task)(void*, size_t), void* argument) = 0;
};

class SerialExecutor final : public Executor {
 public:
  void run(size_t tasks, size_t, void (*task)(void*, size_t), void* argument) override {
    for (size_t i = 0; i < tasks; ++i) task(argument, i);
  }
};

}  // namespace lit_binq
