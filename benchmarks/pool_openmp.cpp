// The kernels' pool beside OpenMP: what the stages of a step cost beyond their work.
//
//     g++ -O2 -std=c++20 -fopenmp -I llm_serving/kernels/cpu/csrc benchmarks/pool_openmp.cpp
//         llm_serving/kernels/cpu/csrc/pool.cpp -o /tmp/pool_openmp
//     for i in 1 2 3; do
//       /tmp/pool_openmp pool
//       for policy in active passive; do
//         for way in region regions; do OMP_WAIT_POLICY=$policy OMP_PROC_BIND=true /tmp/pool_openmp $way; done
//       done
//     done
//
// A step is 300 stages of 8 us on each of two threads, after 300 us in which only one works, as a decode step of one
// row: the pool's stages, those of one OpenMP region with barriers, or each a region.  A process for each, since
// what waits actively is in the others' way.  Medians of 500 steps, alone and with a neighbour who needs 0.4 ms of a
// processor in every 3 ms, as the front end does.
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "pool.hpp"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int STAGES = 300, STEPS = 500;
constexpr double STAGE_US = 8, ALONE_US = 300;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

// A fixed amount of work, not of time: whoever loses the processor has it still to do.
long turns_per_us = 1000;
[[gnu::noinline]] void work(double us) {
  volatile long sink = 0;
  for (long i = 0, n = static_cast<long>(us * static_cast<double>(turns_per_us)); i < n; i++) sink = sink + 1;
}

// By the quickest of some: what disturbs only ever makes it slower.
void calibrate() {
  double best_us = 1e9;
  for (int i = 0; i < 50; i++) {
    const auto start = Clock::now();
    work(1000);
    best_us = std::min(best_us, us_since(start));
  }
  turns_per_us = static_cast<long>(static_cast<double>(turns_per_us) * 1000 / best_us);
}

void bind(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

void by_pool(llm::Pool& pool) {
  pool.run([&](int) {
    for (int i = 0; i < STAGES; i++) {
      work(STAGE_US);
      pool.barrier();
    }
  });
}

void by_barriers() {
#pragma omp parallel num_threads(2)
  for (int i = 0; i < STAGES; i++) {
    work(STAGE_US);
#pragma omp barrier
  }
}

void by_regions() {
  for (int i = 0; i < STAGES; i++) {
#pragma omp parallel num_threads(2)
    work(STAGE_US);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string way = argc > 1 ? argv[1] : "pool";
  calibrate();
  bind(0);
  llm::Pool pool(way == "pool" ? 2 : 1, 200, {0, 1});
  const std::function<void()> step = way == "pool" ? [&] { by_pool(pool); } : std::function(way == "region" ? by_barriers : by_regions);
  const char* policy = std::getenv("OMP_WAIT_POLICY");
  for (const bool has_neighbour : {false, true}) {
    std::atomic<bool> is_over{false};
    std::thread neighbour([&] {
      cpu_set_t all;
      CPU_ZERO(&all);
      CPU_SET(0, &all);
      CPU_SET(1, &all);
      pthread_setaffinity_np(pthread_self(), sizeof(all), &all);
      while (has_neighbour && !is_over) {
        work(400);
        std::this_thread::sleep_for(std::chrono::microseconds(2600));
      }
    });
    std::vector<double> us;
    for (int i = 0; i < STEPS; i++) {
      work(ALONE_US);
      const auto start = Clock::now();
      step();
      us.push_back(us_since(start));
    }
    is_over = true;
    neighbour.join();
    std::sort(us.begin(), us.end());
    std::printf("%-7s %-8s %-15s %6.2f us a stage beyond its work, p99 of a step %7.0f us\n", way.c_str(),
                way == "pool" ? "" : policy ? policy : "default", has_neighbour ? "with neighbour" : "alone",
                us[STEPS / 2] / STAGES - STAGE_US, us[STEPS * 99 / 100]);
  }
}
