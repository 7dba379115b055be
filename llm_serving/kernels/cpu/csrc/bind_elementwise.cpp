// Norms, rotation and the gate for Python; the tests' way in.
#include "bind.hpp"
#include "bind_arrays.hpp"

namespace nb = nanobind;

namespace llm {

void bind_elementwise(nb::module_& m) {
  m.def(
      "rms_norm",
      [](const Kernels& kernels, const Input& x, const Input& weight, float eps, const Array& y) {
        const float* from = data_of<const float>(x, "x", {-1, -1});
        const auto rows = static_cast<int64_t>(x.shape(0)), n = static_cast<int64_t>(x.shape(1));
        const float* w = data_of<const float>(weight, "weight", {n});
        float* to = data_of<float>(y, "y", {rows, n});
        nb::gil_scoped_release release;
        for (int64_t row = 0; row < rows; row++)
          kernels.elementwise.rms_norm(from + row * n, w, eps, static_cast<int>(n), to + row * n);
      },
      nb::arg("kernels"), nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"),
      "x [rows, n] -> y, which may be x.");
  m.def(
      "add_rms_norm",
      [](const Kernels& kernels, const Input& x, const Array& residual, const Input& weight, float eps, const Array& y) {
        const float* from = data_of<const float>(x, "x", {-1, -1});
        const auto rows = static_cast<int64_t>(x.shape(0)), n = static_cast<int64_t>(x.shape(1));
        float* sum = data_of<float>(residual, "residual", {rows, n});
        const float* w = data_of<const float>(weight, "weight", {n});
        float* to = data_of<float>(y, "y", {rows, n});
        nb::gil_scoped_release release;
        for (int64_t row = 0; row < rows; row++)
          kernels.elementwise.add_rms_norm(from + row * n, sum + row * n, w, eps, static_cast<int>(n), to + row * n);
      },
      nb::arg("kernels"), nb::arg("x"), nb::arg("residual"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"),
      "residual += x, y = the norm of it; y may be x.");
  m.def(
      "rotate",
      [](const Kernels& kernels, const Array& heads, const Input& cos, const Input& sin) {
        float* from = data_of<float>(heads, "heads", {-1, -1});
        const auto rows = static_cast<int64_t>(heads.shape(0)), d = static_cast<int64_t>(heads.shape(1));
        require(d % 2 == 0, "heads must have an even size");
        const float* c = data_of<const float>(cos, "cos", {d});
        const float* s = data_of<const float>(sin, "sin", {d});
        nb::gil_scoped_release release;
        for (int64_t row = 0; row < rows; row++) kernels.elementwise.rotate(from + row * d, c, s, static_cast<int>(d));
      },
      nb::arg("kernels"), nb::arg("heads"), nb::arg("cos"), nb::arg("sin"), "Heads [n, d] at one position, in place.");
  m.def(
      "silu_mul",
      [](const Kernels& kernels, const Input& gate, const Input& up, const Array& y) {
        const float* g = data_of<const float>(gate, "gate", {-1});
        const auto n = static_cast<int64_t>(gate.shape(0));
        const float* u = data_of<const float>(up, "up", {n});
        float* to = data_of<float>(y, "y", {n});
        nb::gil_scoped_release release;
        kernels.elementwise.silu_mul(g, u, static_cast<int>(n), to);
      },
      nb::arg("kernels"), nb::arg("gate"), nb::arg("up"), nb::arg("y"), "silu(gate) * up, n of each.");
}

}  // namespace llm
