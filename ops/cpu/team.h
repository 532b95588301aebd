// The library's own threads: a few that wait for work, beside the caller, who always takes part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace scarlet {

// Runs task(0) ... task(count - 1), fewer than 2^32, on the team; returns when all are done. Each thread begins
// with a stretch of them, in order (so what follows in memory best follows in number), and goes on with the
// others', from the end. `scratch` is the running thread's own: `scratch_floats` floats, aligned to 64 bytes.
//
// The caller never waits for a thread that has not begun: it may finish the work alone, so that nothing
// here can deadlock with the pool that the caller comes from. If the team is busy with another caller's
// work, the tasks run on this thread alone.
using Task = std::function<void(int64_t index, float* scratch)>;
void run_tasks(int64_t count, size_t scratch_floats, const Task& task);

// Threads including the caller; 0 for all the cores that the process may run on. Takes effect at the next
// call. The environment variable SCARLET_THREADS sets the initial value.
void set_threads(int threads);
int threads();

// Within its scope, this thread's floating point keeps subnormals (XLA's threads flush them to zero).
class KeepSubnormals {
 public:
  KeepSubnormals();
  ~KeepSubnormals();
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
  unsigned saved_;
};

// Within its scope, this thread's floating point takes subnormals for zeros, as XLA's does.
class FlushSubnormals {
 public:
  FlushSubnormals();
  ~FlushSubnormals();
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
};

}  // namespace scarlet
