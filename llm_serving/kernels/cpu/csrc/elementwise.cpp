// What happens to a row between two linear layers.
#include "elementwise.hpp"

#include "kernels.hpp"

namespace llm {
namespace ISA {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int n, float* y) {
  rms_norm_row(x, weight, eps, n, y);
}

void add_rms_norm(const float* x, float* residual, const float* weight, float eps, int n, float* y) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(residual + i, add(load(residual + i), load(x + i)));
  if (i < n) store(residual + i, add(load(residual + i, n - i), load(x + i, n - i)), n - i);
  rms_norm_row(residual, weight, eps, n, y);
}

void rotate(float* head, const float* cos, const float* sin, int d) { rotate_head(head, cos, sin, d); }

void silu_mul_row(const float* gate, const float* up, int n, float* y) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, silu_mul(load(gate + i), load(up + i)));
  if (i < n) store(y + i, silu_mul(load(gate + i, n - i), load(up + i, n - i)), n - i);
}

}  // namespace

ElementwiseKernels elementwise_kernels() { return {rms_norm, add_rms_norm, rotate, silu_mul_row}; }

}  // namespace ISA
}  // namespace llm
