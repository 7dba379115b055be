// Takes pages from the system before somebody writes to them, in a thread of its own, while nothing else is done.
//
// A page is cleared when it is first written to.  That takes 0.2 ms for 2 MiB, but 5 ms where a hypervisor finds
// the memory only then, and whoever waits at a barrier for the one who writes waits as long.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

namespace llm {

class PagesAhead {
 public:
  // `count` arrays of `size` bytes follow each other from `data`; they must outlive this.
  PagesAhead(uint8_t* data, int count, size_t size);
  ~PagesAhead();
  PagesAhead(const PagesAhead&) = delete;
  PagesAhead& operator=(const PagesAhead&) = delete;

  // Work begins: nothing is taken until 20 ms after its end.  Then the thread goes on until the first `bytes` of each
  // array are there, and never back.  What is in memory stays as it is.  Where the system has no more pages, or no way
  // to ask for them (Linux before 5.14), the thread ends.  One caller at a time.
  void begin_work(size_t bytes);
  void end_work() { works_.fetch_add(1); }

 private:
  void work();
  bool take(size_t piece) const;

  uint8_t* const data_;
  const int count_;
  const size_t size_;
  std::atomic<size_t> wanted_{0};  // pieces: one of each array in turn, since they are written to side by side
  std::atomic<uint32_t> works_{0};  // begun and ended; odd: one is under way
  std::atomic<bool> is_ending_{false};
  std::thread thread_;  // last: it uses all of the others
};

}  // namespace llm
