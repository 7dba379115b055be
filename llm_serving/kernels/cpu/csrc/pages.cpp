#include "pages.hpp"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>

namespace llm {
namespace {

constexpr int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, which older headers lack
constexpr size_t STEP = 64 << 10;   // bytes of each array in turn, since they are written to side by side
constexpr size_t END = SIZE_MAX;

}  // namespace

PagesAhead::PagesAhead(uint8_t* data, int count, size_t size)
    : data_(data), count_(count), size_(size), thread_([this] { work(); }) {}

PagesAhead::~PagesAhead() {
  wanted_.store(END);
  wanted_.notify_one();
  thread_.join();
}

void PagesAhead::reach(size_t bytes) {
  const size_t steps = (std::min(bytes, size_) + STEP - 1) / STEP;
  const size_t wanted = std::min(steps * STEP, size_);
  if (wanted <= wanted_.load()) return;
  wanted_.store(wanted);
  wanted_.notify_one();
}

void PagesAhead::work() {
  setpriority(PRIO_PROCESS, 0, 19);  // of this thread alone: those who compute come first
  for (size_t done = 0; done < size_;) {
    const size_t wanted = wanted_.load();
    if (wanted == END) return;
    if (wanted <= done) {
      wanted_.wait(wanted);
      continue;
    }
    const size_t end = std::min(done + STEP, size_);
    if (!take(done, end)) return;
    done = end;
  }
}

bool PagesAhead::take(size_t begin, size_t end) const {
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  for (int i = 0; i < count_ && wanted_.load() != END; i++) {
    const uintptr_t array = reinterpret_cast<uintptr_t>(data_) + i * size_;
    const uintptr_t first = (array + begin) / page * page;
    if (madvise(reinterpret_cast<void*>(first), array + end - first, POPULATE_WRITE) != 0) return false;
  }
  return true;
}

}  // namespace llm
