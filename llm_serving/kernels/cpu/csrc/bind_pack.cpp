// Python: weights into panels, and weights that are packed.
#include <nanobind/stl/optional.h>

#include "bind.hpp"
#include "bind_linear.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace llm {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check_shape(Format format, int n, int k) {
  require(n >= 1 && k >= 1 && n <= 1 << 30 && k <= 1 << 30, "n and k must be 1 to 2^30");
  require(!in_blocks(format) || k % BLOCK == 0,
          "q8_0, q4_0 and q4_1 need k in multiples of 32, not " + std::to_string(k));
  require(format != Format::i8 || k <= 65536,
          "i8 sums in 32 bits: k must be at most 65536, not " + std::to_string(k));
}

void check_data(const uint8_t* data, size_t size, Format format, int n, int k) {
  check_shape(format, n, k);
  const size_t needed = packed_bytes(format, n, k);
  require(size == needed, "data must have packed_bytes(format, n, k) = " + std::to_string(needed) +
                              " bytes, not " + std::to_string(size));
  require(reinterpret_cast<uintptr_t>(data) % 64 == 0, "data must be aligned to 64 bytes");
}

bool own_blocks(Format format, Source source) {
  return static_cast<int>(format) - static_cast<int>(Format::q8_0) ==
         static_cast<int>(source) - static_cast<int>(Source::q8_0);
}

void pack(Pool& pool, Format format, Source source, const Rows& rows, const Bytes& data, int n, int k, int first) {
  check_data(data.data(), data.size(), format, n, k);
  require(!in_blocks(format) || own_blocks(format, source),
          "a block format is packed from its own blocks only");
  require(source < Source::q8_0 || k % BLOCK == 0,
          "rows of blocks have k in multiples of 32, not " + std::to_string(k));
  const size_t row_bytes = source_bytes(source, k);
  require(rows.shape(1) == row_bytes, "a row of k values of this source has " + std::to_string(row_bytes) +
                                          " bytes, not " + std::to_string(rows.shape(1)));
  require(first >= 0 && static_cast<size_t>(first) + rows.shape(0) <= static_cast<size_t>(n),
          "first + the number of rows must be at most n");
  const int end = first + static_cast<int>(rows.shape(0));
  const uint8_t* from = rows.data();
  uint8_t* to = data.data();
  nb::gil_scoped_release released;
  Items panels;
  pool.run([&](int) {
    for (int p = first / PANEL + panels.take(); p * PANEL < end; p = first / PANEL + panels.take()) {
      const int top = p * PANEL > first ? p * PANEL : first;
      const int bottom = (p + 1) * PANEL < end ? (p + 1) * PANEL : end;
      pack_rows(format, source, from + (top - first) * row_bytes, top, bottom - top, n, k, to);
    }
  });
}

// An embedding: rows of `source` [n, bytes of a row] -> values [ids, k].
void unpack(Source source, const Rows& rows, const nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig>& ids,
            const nb::ndarray<float, nb::ndim<2>, nb::c_contig>& values) {
  const int k = static_cast<int>(values.shape(1)), count = static_cast<int>(ids.size());
  require(rows.shape(1) == source_bytes(source, k), "rows must have the bytes of k values of this source");
  require(values.shape(0) == ids.size(), "values must have a row for each id");
  for (int i = 0; i < count; i++)
    require(ids.data()[i] >= 0 && static_cast<size_t>(ids.data()[i]) < rows.shape(0), "ids must be rows");
  unpack_rows(source, rows.data(), k, ids.data(), count, values.data());
}

size_t checked_packed_bytes(Format format, int n, int k) {
  check_shape(format, n, k);
  return packed_bytes(format, n, k);
}

}  // namespace

PackedWeight::PackedWeight(Format format, int n, int k, Data data, std::optional<Bias> bias)
    : format(format), n(n), k(k), data_(std::move(data)), bias_(std::move(bias)) {
  check_data(data_.data(), data_.size(), format, n, k);
  require(!bias_ || bias_->size() == static_cast<size_t>(n),
          "bias must have n = " + std::to_string(n) + " values");
}

void bind_pack(nb::module_& m) {
  nb::enum_<Format>(m, "Format", "How a packed weight holds its numbers.")
      .value("F32", Format::f32)
      .value("BF16", Format::bf16)
      .value("I8", Format::i8, "one scale for each output; activations one for each token")
      .value("Q8_0", Format::q8_0)
      .value("Q4_0", Format::q4_0)
      .value("Q4_1", Format::q4_1);
  nb::enum_<Source>(m, "Source", "What the rows hold that a weight is packed from.")
      .value("F32", Source::f32)
      .value("BF16", Source::bf16)
      .value("Q8_0", Source::q8_0)
      .value("Q4_0", Source::q4_0)
      .value("Q4_1", Source::q4_1);
  nb::class_<PackedWeight>(m, "PackedWeight", "A weight [n, k] in panels, with its bias.")
      .def(nb::init<Format, int, int, PackedWeight::Data, std::optional<PackedWeight::Bias>>(), "format"_a,
           "n"_a, "k"_a, "data"_a, "bias"_a = nb::none())
      .def_ro("format", &PackedWeight::format)
      .def_ro("n", &PackedWeight::n)
      .def_ro("k", &PackedWeight::k);
  m.def("unpack", &unpack, "source"_a, "rows"_a, "ids"_a, "values"_a,
        "Some rows (uint8 views [n, bytes of a row]) as float32 into values [ids, k].");
  m.def("packed_bytes", &checked_packed_bytes, "format"_a, "n"_a, "k"_a,
        "Bytes that a packed weight [n, k] needs, aligned to 64.");
  m.def("pack", &pack, "pool"_a, "format"_a, "source"_a, "rows"_a, "data"_a, "n"_a, "k"_a, "first"_a = 0,
        "Pack rows [count, bytes of a row] (uint8 views) as rows first, first + 1 ... of a weight [n, k].  The\n"
        "call that packs row n - 1 fills the padding.");
}

}  // namespace llm
