// Who runs the tasks of a multiplication, how many there are, and in which mode.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

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

// On somebody's threads where waking them is worth it, else here.
inline void run_tasks(bool share, Executor& executor, int64_t tasks, int64_t batches, void (*task)(void*, size_t),
                      void* argument) {
  SerialExecutor serial;
  (share ? executor : serial)
      .run(static_cast<size_t>(tasks), static_cast<size_t>(std::max(batches, int64_t{1})), task, argument);
}

// Tasks that a panel should at least give, so that few tiles and many rows still feed several threads.
constexpr int64_t kWantedTasks = 16;
constexpr int64_t kMinTaskRows = 4;

// Tasks for each tile, by ranges of the panel's rows. `pieces` is how much work there is, in what is worth a thread.
inline int64_t row_parts(int64_t pieces, int64_t rows, int64_t tiles) {
  const int64_t wanted = std::clamp(pieces, int64_t{1}, kWantedTasks);
  return std::clamp((wanted + tiles - 1) / tiles, int64_t{1}, std::max(rows / kMinTaskRows, int64_t{1}));
}

}  // namespace lit_binq
