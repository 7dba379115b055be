// Python: a linear layer by itself, and the time that many take (the plan of a step is plan.cpp).
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <vector>

#include "bind.hpp"
#include "bind_linear.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace llm {
namespace {

using Input = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Clock = std::chrono::steady_clock;

// Memory for the activations, aligned to 64 bytes.  NaN, so that a kernel which reads what nobody wrote is seen.
class Scratch {
 public:
  explicit Scratch(size_t size) : bytes_(size + 64, 0xff) {}
  uint8_t* get() {
    return reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(bytes_.data()), 64));
  }

 private:
  std::vector<uint8_t> bytes_;
};

// Three items for each thread, but no large ones: the threads end together, and one that was interrupted
// leaves its share to the others.
int panels_per_item(int num_panels, int num_threads) {
  const int share = (num_panels + 3 * num_threads - 1) / (3 * num_threads);
  return share < 16 ? share : 16;
}

// num_rows rows of x through one weight; `run` is called by every thread of the pool.
struct LinearCall {
  const LinearKernels& kernels;
  const Packed& weight;
  const float* x;
  size_t ldx;
  int num_rows;
  float* y;
  size_t ldy;
  Epilogue epilogue;
  Items rows{}, panels{};

  void run(Pool& pool, uint8_t* activations) {
    const size_t bytes = kernels.activation_bytes(weight.format, weight.k);
    for (int r = rows.take(); r < num_rows; r = rows.take())
      kernels.quantize(weight.format, x + r * ldx, ldx, 1, weight.k, activations + r * bytes);
    pool.barrier();
    const int num_panels = static_cast<int>(round_up(weight.n, PANEL) / PANEL);
    const int share = panels_per_item(num_panels, pool.size());
    for (int p = share * panels.take(); p < num_panels; p = share * panels.take())
      kernels.multiply(weight, activations, num_rows, p, std::min(p + share, num_panels), y, ldy, epilogue);
  }
};

void check_call(const Packed& weight, const Input& x, const Output& y, Epilogue epilogue) {
  require(x.shape(1) == static_cast<size_t>(weight.k), "x must have k = " + std::to_string(weight.k) +
                                                           " columns, not " + std::to_string(x.shape(1)));
  require(epilogue != Epilogue::silu_mul || weight.n % PANEL == 0,
          "silu_mul needs n in multiples of 32, not " + std::to_string(weight.n));
  const size_t columns = epilogue == Epilogue::silu_mul ? weight.n / 2 : weight.n;
  require(y.shape(0) == x.shape(0) && y.shape(1) == columns,
          "y must have shape (" + std::to_string(x.shape(0)) + ", " + std::to_string(columns) + ")");
  require((x.shape(1) == 1 || x.stride(1) == 1) && (y.shape(1) == 1 || y.stride(1) == 1),
          "the columns of x and of y must lie next to each other");
}

void linear(const Kernels& kernels, Pool& pool, const PackedWeight& weight, const Input& x, const Output& y,
            Epilogue epilogue) {
  const Packed packed = weight.view();
  check_call(packed, x, y, epilogue);
  LinearCall call{kernels.linear,
                  packed,
                  x.data(),
                  static_cast<size_t>(x.stride(0)),
                  static_cast<int>(x.shape(0)),
                  y.data(),
                  static_cast<size_t>(y.stride(0)),
                  epilogue};
  nb::gil_scoped_release released;
  Scratch scratch(call.num_rows * kernels.linear.activation_bytes(packed.format, packed.k));
  pool.run([&](int) { call.run(pool, scratch.get()); });
}

// Seconds for num_rows rows through all weights, one after another as in a step, `repeats` times.
std::vector<double> time_linears(const Kernels& kernels, Pool& pool,
                                 const std::vector<const PackedWeight*>& weights, int num_rows, int repeats) {
  require(!weights.empty() && num_rows >= 1 && repeats >= 1,
          "weights must not be empty, num_rows and repeats be at least 1");
  std::vector<Packed> packed;
  size_t activations = 0, k = 0, n = 0;
  for (const PackedWeight* weight : weights) {
    packed.push_back(weight->view());
    activations =
        std::max(activations, num_rows * kernels.linear.activation_bytes(weight->format, weight->k));
    k = std::max<size_t>(k, weight->k);
    n = std::max<size_t>(n, weight->n);
  }
  nb::gil_scoped_release released;
  std::vector<float> x(num_rows * k), y(num_rows * n);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i * 2654435761u % 1000) / 500 - 1;
  Scratch scratch(activations);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; i++) {
    std::deque<LinearCall> calls;
    for (const Packed& weight : packed)
      calls.emplace_back(kernels.linear, weight, x.data(), weight.k, num_rows, y.data(), weight.n,
                         Epilogue::store);
    const auto start = Clock::now();
    pool.run([&](int) {
      for (LinearCall& call : calls) {
        call.run(pool, scratch.get());
        pool.barrier();
      }
    });
    seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  return seconds;
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::enum_<Epilogue>(m, "Epilogue", "What becomes of the results.")
      .value("STORE", Epilogue::store)
      .value("ADD", Epilogue::add, "y += x weight^T + bias")
      .value("SILU_MUL", Epilogue::silu_mul,
             "gates and up-projections, interleaved by 16 rows of the weight: y [rows, n / 2]");
  m.def("linear", &linear, "kernels"_a, "pool"_a, "weight"_a, "x"_a, "y"_a, "epilogue"_a = Epilogue::store,
        "x [rows, k] times the transposed weight, plus bias, into y; all float32.");
  m.def("time_linears", &time_linears, "kernels"_a, "pool"_a, "weights"_a, "num_rows"_a, "repeats"_a,
        "Seconds for num_rows rows through all weights one after another, for each of some repeats.");
}

}  // namespace llm
