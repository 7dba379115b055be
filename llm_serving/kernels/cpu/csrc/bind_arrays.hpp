// Arrays of Python, checked: what is wrong is said in a sentence.
#pragma once

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace llm {

using Array = nanobind::ndarray<nanobind::device::cpu>;                     // written to
using Input = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;

inline std::string shape_of(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
  return text + "]";
}

template <typename T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  if constexpr (std::is_same_v<T, int32_t>) return "int32";
  if constexpr (std::is_same_v<T, uint16_t>) return "uint16";
  if constexpr (std::is_same_v<T, uint8_t>) return "uint8";
  if constexpr (std::is_same_v<T, int8_t>) return "int8";
}

// The data of a contiguous array of this type and shape (-1: any size).  Raises ValueError.
template <typename T, typename A>
T* data_of(const A& array, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = array.dtype() == nanobind::dtype<std::remove_const_t<T>>() && array.ndim() == shape.size();
  const bool is_empty = array.size() == 0;  // its strides may be anything
  int64_t stride = 1;
  for (size_t i = array.ndim(); fits && i-- > 0;) {
    const int64_t wanted = shape.begin()[i], size = static_cast<int64_t>(array.shape(i));
    fits = (wanted < 0 || size == wanted) && (is_empty || size <= 1 || array.stride(i) == stride);
    stride *= size;
  }
  if (!fits)
    throw std::invalid_argument(std::string(name) + " must be a contiguous " +
                                type_name<std::remove_const_t<T>>() + " array of shape " + shape_of(shape));
  return static_cast<T*>(const_cast<void*>(static_cast<const void*>(array.data())));
}

// What rows of logits amount to, SUMMARY_DTYPE as float32 [n, ranges of a row, 4]; T: float or const float.
template <typename T, typename A>
auto* summaries_of(const A& array, const char* name, int64_t n, int width) {
  T* data = data_of<T>(array, name, {n, num_ranges(width), sizeof(Summary) / 4});
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const Summary, Summary>*>(data);
}

// Bad arguments become a ValueError.
inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

}  // namespace llm
