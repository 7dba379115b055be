// Packed weights as Python holds them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>

#include "bind_arrays.hpp"
#include "layout.hpp"

namespace llm {

// Owns (references to) the memory that `view` points into.
class PackedWeight {
 public:
  using Data = nanobind::ndarray<const uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
  using Bias = nanobind::ndarray<const float, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

  PackedWeight(Format format, int n, int k, Data data, std::optional<Bias> bias);
  Packed view() const { return {format, n, k, data_.data(), bias_ ? bias_->data() : nullptr}; }

  const Format format;
  const int n, k;

 private:
  Data data_;
  std::optional<Bias> bias_;
};

}  // namespace llm
