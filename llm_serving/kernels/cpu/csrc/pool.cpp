#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llm {
namespace {

using Clock = std::chrono::steady_clock;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// A processor that is not there any more is no reason to fail.
void run_on(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);
}

}  // namespace

// `round` counts calls of run, `generation` barriers.  The standard's atomic wait is a futex on Linux.
struct Pool::Workers {
  alignas(64) std::atomic<int> round{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> generation{0};
  const std::function<void(int)>* work = nullptr;  // null: the end
  std::chrono::microseconds spin{0};
  std::vector<std::thread> threads;

  // Returns when `value` is no longer `old`.
  void wait(const std::atomic<int>& value, int old) const {
    if (spin.count() > 0) {
      const auto until = Clock::now() + spin;
      do {
        for (int i = 0; i < 32; i++) {
          if (value.load(std::memory_order_acquire) != old) return;
          pause();
        }
      } while (Clock::now() < until);
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  }

  void start_round(const std::function<void(int)>* next) {
    work = next;
    round.fetch_add(1, std::memory_order_release);
    round.notify_all();
  }

  void barrier(int size) {
    const int old = generation.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size) return wait(generation, old);
    arrived.store(0, std::memory_order_relaxed);
    generation.fetch_add(1, std::memory_order_release);
    generation.notify_all();
  }
};

Pool::Pool(int size, int spin_us, const std::vector<int>& cpus) : size_(size), workers_(std::make_unique<Workers>()) {
  workers_->spin = std::chrono::microseconds(spin_us);
  for (int thread = 1; thread < size; thread++) {
    workers_->threads.emplace_back([this, thread] {
      for (int seen = 0;; seen++) {
        workers_->wait(workers_->round, seen);
        const auto* work = workers_->work;
        if (work == nullptr) return;
        (*work)(thread);
        barrier();
      }
    });
    if (!cpus.empty()) run_on(workers_->threads.back().native_handle(), cpus[thread]);
  }
}

Pool::~Pool() {
  workers_->start_round(nullptr);
  for (auto& thread : workers_->threads) thread.join();
}

void Pool::run(const std::function<void(int)>& work) {
  if (size_ > 1) workers_->start_round(&work);
  work(0);
  barrier();
}

void Pool::barrier() {
  if (size_ > 1) workers_->barrier(size_);
}

}  // namespace llm
