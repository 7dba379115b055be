// Python: pages that are taken ahead.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "bind.hpp"
#include "pages.hpp"

namespace nb = nanobind;

namespace llm {

using Arrays = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void bind_pages(nb::module_& m) {
  nb::class_<PagesAhead>(m, "PagesAhead", "A thread that takes the pages of arrays before they are written to.")
      .def(
          "__init__",
          [](PagesAhead* self, const Arrays& arrays) {
            new (self) PagesAhead(arrays.data(), static_cast<int>(arrays.shape(0)), arrays.shape(1));
          },
          nb::arg("arrays").noconvert(), nb::keep_alive<1, 2>(),
          "`arrays` [count, bytes]: all are written to from their beginnings on, at the same rate.")
      .def("begin_work", &PagesAhead::begin_work, nb::arg("bytes"),
           "Once there has been no work for 20 ms, take the pages of the first `bytes` of each array.")
      .def("end_work", &PagesAhead::end_work);
}

}  // namespace llm
