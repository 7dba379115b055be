#include "pages.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace llm {
namespace {

constexpr int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, which older headers lack
constexpr size_t PIECE = 1 << 20;   // bytes of an array that are taken at once
constexpr auto REST = std::chrono::milliseconds(20);

}  // namespace

PagesAhead::PagesAhead(uint8_t* data, int count, size_t size)
    : data_(data), count_(count), size_(size), thread_([this] { work(); }) {}

PagesAhead::~PagesAhead() {
  is_ending_.store(true);
  wanted_.store(SIZE_MAX);
  wanted_.notify_one();
  thread_.join();
}

void PagesAhead::begin_work(size_t bytes) {
  works_.fetch_add(1);
  const size_t wanted = (std::min(bytes, size_) + PIECE - 1) / PIECE * count_;
  if (wanted <= wanted_.load()) return;
  wanted_.store(wanted);
  wanted_.notify_one();
}

void PagesAhead::work() {
  const size_t all = (size_ + PIECE - 1) / PIECE * count_;
  for (size_t done = 0; done < all;) {
    const size_t wanted = wanted_.load();
    if (wanted <= done) {
      wanted_.wait(wanted);
      continue;
    }
    const uint32_t works = works_.load();
    std::this_thread::sleep_for(REST);
    while (works % 2 == 0 && done < std::min(wanted, all) && works == works_.load() && !is_ending_.load())
      if (!take(done++)) return;
    if (is_ending_.load()) return;
  }
}

bool PagesAhead::take(size_t piece) const {
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  const size_t begin = piece / count_ * PIECE, end = std::min(begin + PIECE, size_);
  const uintptr_t array = reinterpret_cast<uintptr_t>(data_) + piece % count_ * size_;
  const uintptr_t first = (array + begin) / page * page;
  return madvise(reinterpret_cast<void*>(first), array + end - first, POPULATE_WRITE) == 0;
}

}  // namespace llm
