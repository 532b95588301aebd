#include "team.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace scarlet {
namespace {

// How long an idle thread looks out for the next call before it sleeps: a little more than the time that
// a model spends between two calls, and too short to matter to other programs.
constexpr std::chrono::microseconds kSpin(50);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

int initial_threads() {
  const char* text = std::getenv("SCARLET_THREADS");
  const int n = text ? std::atoi(text) : 0;
  return n > 0 ? n : cores();
}

std::atomic<int> wanted_threads{0};  // 0: not yet asked for

class Scratch {
 public:
  float* of_size(size_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};

float* own_scratch(size_t floats) {
  thread_local Scratch scratch;
  return scratch.of_size(floats);
}

// The tasks that one thread begins with: numbers from `next` up to `end`, in one word. Its own thread takes
// them in order, which for rows of weights means reading on where it is; one that has run out of its own takes
// the last, which is furthest from there.
class alignas(64) Share {
 public:
  void set(int64_t next, int64_t end) { word_.store(pack(next, end), std::memory_order_relaxed); }

  int64_t take_first() {
    return take([](uint32_t& next, uint32_t&) { return next++; });
  }
  int64_t take_last() {
    return take([](uint32_t&, uint32_t& end) { return --end; });
  }

 private:
  static uint64_t pack(uint64_t next, uint64_t end) { return next << 32 | end; }

  template <class Choose>
  int64_t take(Choose choose) {  // the task's number; -1 if none is left
    uint64_t word = word_.load(std::memory_order_relaxed);
    for (;;) {
      uint32_t next = static_cast<uint32_t>(word >> 32), end = static_cast<uint32_t>(word);
      if (next >= end) return -1;
      const uint32_t task = choose(next, end);
      if (word_.compare_exchange_weak(word, pack(next, end), std::memory_order_relaxed)) return task;
    }
  }

  std::atomic<uint64_t> word_{0};
};

struct Call {
  const Task* task;
  size_t scratch_floats;
  Share* shares;
  int threads;

  void work(int thread) {
    float* scratch = scratch_floats ? own_scratch(scratch_floats) : nullptr;
    for (int64_t i; (i = shares[thread].take_first()) >= 0;) (*task)(i, scratch);
    for (int other = (thread + 1) % threads; other != thread; other = (other + 1) % threads) {
      for (int64_t i; (i = shares[other].take_last()) >= 0;) (*task)(i, scratch);
    }
  }
};

// One call at a time is open; `state_` holds its number, whether it is still open, and how many helpers
// are within it. A helper enters by a compare-and-swap on that word, and so never after it has closed.
class Team {
 public:
  explicit Team(int threads) : shares_(threads) {
    for (int i = 1; i < threads; i++) helpers_.emplace_back([this, i] { help(i); });
  }
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_.store(true);
    }
    awake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }
  int threads() const { return static_cast<int>(shares_.size()); }

  void run(int64_t count, size_t scratch_floats, const Task& task) {
    const int n = threads();
    for (int i = 0; i < n; i++) shares_[i].set(count * i / n, count * (i + 1) / n);
    call_ = {&task, scratch_floats, shares_.data(), n};
    const uint64_t number = (state_.load(std::memory_order_relaxed) / kCall + 1) * kCall;
    state_.store(number | kOpen, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      awake_.notify_all();
    }
    call_.work(0);
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    while (state_.load(std::memory_order_acquire) != number) pause();  // helpers within are finishing
  }

 private:
  static constexpr uint64_t kHelper = 1, kOpen = 1 << 15, kCall = 1 << 16;

  void help(int thread) {
    const KeepSubnormals guard;
    uint64_t done = 0;
    while (wait_for_call(done)) {
      uint64_t state = state_.load(std::memory_order_acquire);
      while ((state & kOpen) && state / kCall != done) {
        if (!state_.compare_exchange_weak(state, state + kHelper, std::memory_order_acq_rel)) continue;
        done = state / kCall;
        call_.work(thread);
        state_.fetch_sub(kHelper, std::memory_order_acq_rel);
        break;
      }
    }
  }

  bool open_beyond(uint64_t done) const {
    const uint64_t state = state_.load(std::memory_order_seq_cst);
    return (state & kOpen) && state / kCall != done;
  }

  // Waits for an open call other than number `done`; false when the team is to end.
  bool wait_for_call(uint64_t done) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; i++) {
        if (open_beyond(done)) return true;
        pause();
      }
      if (stopping_.load()) return false;
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    awake_.wait(lock, [&] { return stopping_.load() || open_beyond(done); });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return !stopping_.load();
  }

  std::atomic<uint64_t> state_{0};
  std::vector<Share> shares_;  // one a thread; they and the call are written while none is open
  Call call_{};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_;
  std::condition_variable awake_;
  std::vector<std::thread> helpers_;
};

// Made at the first call and never destroyed: its threads may outlive the statics of the process.
struct Owner {
  std::mutex busy;
  Team* team = nullptr;
};
Owner* owner = new Owner;

// Threads do not survive a fork, and a lock may be held by one of them: the child starts anew.
void forget_team() { owner = new Owner; }

Team& team_of(Owner& o) {
  const int n = threads();
  if (o.team != nullptr && o.team->threads() != n) {
    delete o.team;
    o.team = nullptr;
  }
  if (o.team == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_team);
    (void)registered;
#endif
    o.team = new Team(n);
  }
  return *o.team;
}

}  // namespace

void run_tasks(int64_t count, size_t scratch_floats, const Task& task) {
  if (count > 1 && threads() > 1) {
    std::unique_lock<std::mutex> lock(owner->busy, std::try_to_lock);
    if (lock.owns_lock()) return team_of(*owner).run(count, scratch_floats, task);
  }
  float* scratch = scratch_floats && count ? own_scratch(scratch_floats) : nullptr;
  for (int64_t i = 0; i < count; i++) task(i, scratch);
}

void set_threads(int n) { wanted_threads.store(n > 0 ? n : cores()); }

int threads() {
  int n = wanted_threads.load(std::memory_order_relaxed);
  if (n == 0) {
    int unset = 0;
    wanted_threads.compare_exchange_strong(unset, initial_threads());
    n = wanted_threads.load();
  }
  return n;
}

#if defined(__x86_64__)
KeepSubnormals::KeepSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
KeepSubnormals::~KeepSubnormals() { _mm_setcsr(saved_); }
FlushSubnormals::FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
FlushSubnormals::~FlushSubnormals() { _mm_setcsr(saved_); }
#else
KeepSubnormals::KeepSubnormals() : saved_(0) {}
KeepSubnormals::~KeepSubnormals() {}
FlushSubnormals::FlushSubnormals() : saved_(0) {}
FlushSubnormals::~FlushSubnormals() {}
#endif

}  // namespace scarlet
