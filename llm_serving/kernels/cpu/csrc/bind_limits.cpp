// Python: the limits of this machine.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <stdexcept>
#include <vector>

#include "bind.hpp"

namespace nb = nanobind;

namespace llm {
namespace {

using Clock = std::chrono::steady_clock;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// GB/s of all threads together, each reading its part of `data`; the best of `rounds`.
double read_bandwidth(const Kernels& kernels, Pool& pool, const Bytes& data, int rounds) {
  const size_t part = data.size() / pool.size() / 1024 * 1024;
  if (part == 0) throw std::invalid_argument("data must hold at least 1024 bytes for each thread");
  const uint8_t* bytes = data.data();
  nb::gil_scoped_release released;
  double best = 0;
  std::vector<int32_t> sums(pool.size());
  for (int round = 0; round < rounds; round++) {
    const auto start = Clock::now();
    pool.run([&](int thread) { sums[thread] = kernels.limits.read(bytes + thread * part, part); });
    const double rate = part * pool.size() / seconds_since(start) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

// 1e9 operations a second of all threads together; the best of `rounds` of 10 ms or so.
double peak(const Kernels& kernels, Pool& pool, Format format, int rounds) {
  if (format > Format::i8) throw std::invalid_argument("format must be F32, BF16 or I8");
  nb::gil_scoped_release released;
  double best = 0;
  std::vector<double> operations(pool.size());
  for (int round = 0; round < rounds; round++) {
    const auto start = Clock::now();
    pool.run([&](int thread) {
      operations[thread] = kernels.limits.multiply(format, 1'000'000);
    });
    const double rate = operations[0] * pool.size() / seconds_since(start) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

void bind_limits(nb::module_& m) {
  m.def("read_bandwidth", &read_bandwidth, nb::arg("kernels"), nb::arg("pool"), nb::arg("data"),
        nb::arg("rounds") = 7, "GB/s at which all threads read `data`, best of some rounds.");
  m.def("peak", &peak, nb::arg("kernels"), nb::arg("pool"), nb::arg("format"), nb::arg("rounds") = 9,
        "1e9 operations per second (a multiply-add is two) of all threads in a format's instruction.");
}

}  // namespace llm
