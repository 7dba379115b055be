// The extension module: the pool, and the bindings of each room.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <vector>

#include "bind.hpp"

namespace nb = nanobind;

namespace llm {

void bind_pool(nb::module_& m) {
  nb::class_<Pool>(m, "Pool", "The threads of every operation: the caller and num_threads - 1 workers.")
      .def(
          "__init__",
          [](Pool* self, int num_threads, int spin_us, const std::vector<int>& cpus) {
            if (num_threads < 1 || num_threads > 1024)
              throw std::invalid_argument("num_threads must be 1 to 1024");
            if (spin_us < 0) throw std::invalid_argument("spin_us must not be negative");
            if (!cpus.empty() && cpus.size() != static_cast<size_t>(num_threads))
              throw std::invalid_argument("cpus must name a processor for each thread, or none");
            for (int cpu : cpus)
              if (cpu < 0 || cpu >= 1024) throw std::invalid_argument("cpus must be 0 to 1023");
            new (self) Pool(num_threads, spin_us, cpus);
          },
          nb::arg("num_threads"), nb::arg("spin_us") = 200, nb::arg("cpus") = std::vector<int>())
      .def_prop_ro("num_threads", &Pool::size);
}

}  // namespace llm

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels; see csrc/kernels.hpp for layouts and orders of arithmetic.";
  llm::bind_instruction_sets(m);
  llm::bind_pool(m);
  llm::bind_pages(m);
  llm::bind_limits(m);
  llm::bind_pack(m);
  llm::bind_linear(m);
  llm::bind_elementwise(m);
  llm::bind_attention(m);
  llm::bind_sampling(m);
  llm::bind_plan(m);
}
