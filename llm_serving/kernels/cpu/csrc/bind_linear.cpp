#include "bind.hpp"
namespace llm { void bind_linear(nanobind::module_&) {} }
