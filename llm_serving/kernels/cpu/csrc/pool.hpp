// The threads that carry out every native operation: the caller and size - 1 workers.
//
// A worker that has nothing to do spins for a bounded time, then sleeps on a futex: a neighbour on
// its core is never fought for long (docs/decisions/0005).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace llm {

class Pool {
 public:
  // `cpus`: worker i runs on cpus[i] only; empty: wherever the system puts it.  Two threads that wait for each
  // other on one processor do so at every barrier, and as one of them always sleeps, the system sees nothing to
  // balance (docs/decisions/0008).
  Pool(int size, int spin_us, const std::vector<int>& cpus = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // work(thread) on each thread of 0 .. size - 1; returns when all have.  The caller is thread 0.
  // One call at a time.  `work` must not throw.
  void run(const std::function<void(int)>& work);

  // Within `run`: nobody goes on until all threads have come.  What was written before is seen after.
  void barrier();

 private:
  struct Workers;
  int size_;
  std::unique_ptr<Workers> workers_;
};

// Hands out items 0 .. count - 1 in order, to whoever asks first.  Results must not depend on who did
// an item.
class Items {
 public:
  void reset() { next_.store(0, std::memory_order_relaxed); }
  int take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int> next_{0};
};

// The same, but each thread has a range of its own, and takes from the others' only when that is done: what it
// wrote for a row, or read of a weight, is then mostly in its own cache.
class OwnedItems {
 public:
  explicit OwnedItems(int num_threads) : ranges_(num_threads) {}

  void reset() {
    for (Range& range : ranges_) range.taken.store(0, std::memory_order_relaxed);
  }

  // An item of 0 .. count - 1, or -1 when none is left; `count` must be the same for all.
  int take(int thread, int count) {
    const int threads = static_cast<int>(ranges_.size());
    for (int i = 0; i < threads; i++) {
      const int owner = (thread + i) % threads;
      const int64_t begin = int64_t{count} * owner / threads, end = int64_t{count} * (owner + 1) / threads;
      std::atomic<int>& taken = ranges_[owner].taken;
      if (i > 0 && taken.load(std::memory_order_relaxed) >= end - begin) continue;
      const int64_t item = begin + taken.fetch_add(1, std::memory_order_relaxed);
      if (item < end) return static_cast<int>(item);
    }
    return -1;
  }

 private:
  struct alignas(64) Range {
    std::atomic<int> taken{0};
  };
  std::vector<Range> ranges_;
};

}  // namespace llm
