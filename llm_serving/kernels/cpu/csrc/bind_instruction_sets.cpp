// Python: which instruction sets this processor has kernels for, and the kernels of one of them.
#include <cpuid.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind.hpp"

namespace nb = nanobind;

namespace llm {
namespace {

// The kernels of a set are asked for only where the processor has it.
const Kernels& avx2_kernels() {
  static const Kernels kernels = {"avx2", avx2::linear_kernels(), avx2::elementwise_kernels(),
                                  avx2::attention_kernels(), avx2::sampling_kernels(),
                                  avx2::limit_kernels()};
  return kernels;
}

Kernels avx512_with(const char* name, LinearKernels linear) {
  return {name, linear, avx512::elementwise_kernels(), avx512::attention_kernels(), avx512::sampling_kernels(),
          avx512::limit_kernels()};
}

const Kernels& avx512_kernels() {
  static const Kernels kernels = avx512_with("avx512", avx512::linear_kernels());
  return kernels;
}

const Kernels& amx_emulated_kernels() {
  static const Kernels kernels = avx512_with("amx_emulated", amx_emulated::linear_kernels());
  return kernels;
}

// Linux gives tiles to processes that ask (arch_prctl; Documentation/arch/x86/xstate.rst): every thread of the
// process has them then, and alternate signal stacks must be larger.
#if defined(HAS_AMX)
constexpr long GET_XCOMP_SUPP = 0x1021, REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;

bool has_amx() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bf16 | tile | int8;
  unsigned eax, ebx, ecx, edx = 0;
  unsigned long features = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & all) == all &&
         syscall(SYS_arch_prctl, GET_XCOMP_SUPP, &features) == 0 && (features >> XTILEDATA & 1);
}

const Kernels& amx_kernels() {
  static const bool is_permitted = syscall(SYS_arch_prctl, REQ_XCOMP_PERM, XTILEDATA) == 0;
  if (!is_permitted) throw std::invalid_argument("isa amx: the system does not permit tiles to this process");
  static const Kernels kernels = avx512_with("amx", amx::linear_kernels());
  return kernels;
}
#else
bool has_amx() { return false; }
const Kernels& amx_kernels() { return avx512_kernels(); }  // not asked for
#endif

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

std::vector<std::string> on_request() {
  const std::vector<std::string> names = supported();
  if (names.empty() || names.front() != "avx512") return {};
  return has_amx() ? std::vector<std::string>{"amx", "amx_emulated"} : std::vector<std::string>{"amx_emulated"};
}

const Kernels& kernels_of(const std::string& isa) {
  if (isa == "avx2") return avx2_kernels();
  if (isa == "avx512") return avx512_kernels();
  return isa == "amx" ? amx_kernels() : amx_emulated_kernels();
}

const Kernels& kernels(const std::string& isa) {
  std::vector<std::string> names = supported();
  if (names.empty()) throw std::invalid_argument("the native kernels need a processor with AVX2, FMA and F16C");
  if (isa == "auto") return kernels_of(names.front());
  for (const std::string& name : on_request()) names.push_back(name);
  std::string known;
  for (const std::string& name : names) {
    if (isa == name) return kernels_of(name);
    known += ", " + name;
  }
  throw std::invalid_argument("isa must be one of auto" + known + " on this processor, not " + isa);
}

}  // namespace

void bind_instruction_sets(nb::module_& m) {
  nb::class_<Kernels>(m, "Kernels", "The kernels of one instruction set.")
      .def_prop_ro("isa", [](const Kernels& self) { return self.name; });
  m.def("supported", &supported, "Instruction sets of this processor that have kernels, best first.");
  m.def("on_request", &on_request,
        "More of them, whose linear layers alone differ from avx512's, and which \"auto\" never takes: amx, untested\n"
        "on a processor that has it, and amx_emulated, its slow twin for tests.");
  m.def("kernels", &kernels, nb::arg("isa") = "auto", nb::rv_policy::reference,
        "The kernels of `isa`, or of the first that is supported.");
}

}  // namespace llm
