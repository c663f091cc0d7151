// How many threads a call asks for: all of them, or fewer while another process keeps a core.
//
// A parallel region ends when its last thread has arrived, and a thread that shares its core with
// another process arrives some slices of the scheduler late: 4 to 24 ms, twenty calls of a small
// layer. Doing without one of n threads makes a call n / (n - 1) times as long, so it pays as soon
// as more than 1 / n of the time goes by in waiting. From then on a call now and then has the thread
// back, to see whether the core is free again.
#pragma once

#include "vec.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

static INLINE int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

class Team {
 public:
  // A forked child has none of its parent's threads, and OpenMP would wait for them for ever.
  Team() { pthread_atfork(nullptr, nullptr, [] { forked() = true; }); }

  int size(int64_t threads, int64_t now) const {
    if (forked()) return 1;
    int64_t absent = absent_;
    if (absent && now >= retry_) --absent;
    return int(std::max<int64_t>(1, threads - absent));
  }

  // Learn from a call of `size` of `threads` threads, which waited so long for the last of them.
  void record(int64_t threads, int size, int64_t start, int64_t end, int64_t waited) {
    int64_t took = end - start;
    bool late = waited > SLICE && waited * size > took;
    if (size > threads - absent_) {  // with a thread that the calls before did without
      if (late) retry_ = end + PATIENCE * waited;
      else --absent_;
      return;
    }
    waited_ = waited_ - waited_ / CALLS + waited;
    took_ = took_ - took_ / CALLS + took;
    if (!late || waited_ * size <= took_) return;
    absent_ = threads - size + 1;
    retry_ = end + PATIENCE * waited;
    waited_ = took_ = 0;
  }

 private:
  static constexpr int64_t SLICE = 1000000;  // no thread that has lost its core is back before
  static constexpr int64_t PATIENCE = 20;    // trying again may take a twentieth of the time
  static constexpr int64_t CALLS = 16;       // that waiting is averaged over: one alone is chance

  static bool& forked() {
    static bool value = false;
    return value;
  }

  // Calls from several threads may mix these up; only the speed of the next calls depends on them.
  std::atomic<int64_t> absent_{0}, retry_{0}, waited_{0}, took_{0};
};

// The time that each thread of a region waits for the others.
class Waits {
 public:
  explicit Waits(int threads) : each_(threads) {}

  // What the threads call when they have nothing left to do: to go on together, or to go.
  void meet() {
    int64_t from = nanoseconds();
#pragma omp barrier
    each_[omp_get_thread_num()].waited += nanoseconds() - from;
  }
  void leave() { each_[omp_get_thread_num()].left = nanoseconds(); }

  // What a thread in the middle has waited until the region ended: one that is late has not, the
  // others have waited for it.
  int64_t median(int64_t end) {
    for (Wait& one : each_) one.waited += one.left ? end - one.left : 0;
    auto middle = each_.begin() + each_.size() / 2;
    std::nth_element(each_.begin(), middle, each_.end(),
                     [](const Wait& a, const Wait& b) { return a.waited < b.waited; });
    return middle->waited;
  }

 private:
  struct alignas(64) Wait { int64_t waited = 0, left = 0; };
  std::vector<Wait> each_;
};
