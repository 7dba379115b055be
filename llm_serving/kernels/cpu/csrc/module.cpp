// The extension module: which instruction set, the pool, and the operations of each room.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind.hpp"

namespace nb = nanobind;

namespace llm {
namespace {

// Asked for only where the processor has the instruction set.
const Kernels& avx512_kernels() {
  static const Kernels kernels = {"avx512", avx512::linear_kernels(), avx512::elementwise_kernels(),
                                  avx512::attention_kernels(), avx512::sampling_kernels(),
                                  avx512::limit_kernels()};
  return kernels;
}

const Kernels& avx2_kernels() {
  static const Kernels kernels = {"avx2", avx2::linear_kernels(), avx2::elementwise_kernels(),
                                  avx2::attention_kernels(), avx2::sampling_kernels(),
                                  avx2::limit_kernels()};
  return kernels;
}

// Best first.
std::vector<std::string> supported() {
  std::vector<std::string> names;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx512) names.emplace_back("avx512");
  if (avx2) names.emplace_back("avx2");
  return names;
}

const Kernels& kernels(const std::string& isa) {
  const std::vector<std::string> names = supported();
  if (names.empty()) throw std::invalid_argument("the native kernels need a processor with AVX2, FMA and F16C");
  for (const std::string& name : names)
    if (isa == "auto" || isa == name) return name == "avx512" ? avx512_kernels() : avx2_kernels();
  std::string known;
  for (const std::string& name : names) known += ", " + name;
  throw std::invalid_argument("isa must be one of auto" + known + " on this processor, not " + isa);
}

}  // namespace

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
  nb::class_<llm::Kernels>(m, "Kernels", "The kernels of one instruction set.")
      .def_prop_ro("isa", [](const llm::Kernels& self) { return self.name; });
  m.def("supported", &llm::supported, "Instruction sets of this processor that have kernels, best first.");
  m.def("kernels", &llm::kernels, nb::arg("isa") = "auto", nb::rv_policy::reference,
        "The kernels of `isa`, or of the best instruction set.");
  llm::bind_pool(m);
  llm::bind_limits(m);
  llm::bind_pack(m);
  llm::bind_linear(m);
  llm::bind_elementwise(m);
  llm::bind_attention(m);
  llm::bind_sampling(m);
  llm::bind_plan(m);
}
