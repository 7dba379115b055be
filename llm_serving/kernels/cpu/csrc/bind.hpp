// What the bindings of each room share.
#pragma once

#include <nanobind/nanobind.h>

#include "kernels.hpp"
#include "pool.hpp"

namespace llm {

void bind_instruction_sets(nanobind::module_&);
void bind_pool(nanobind::module_&);
void bind_pages(nanobind::module_&);
void bind_limits(nanobind::module_&);
void bind_pack(nanobind::module_&);
void bind_linear(nanobind::module_&);
void bind_elementwise(nanobind::module_&);
void bind_attention(nanobind::module_&);
void bind_sampling(nanobind::module_&);
void bind_plan(nanobind::module_&);

}  // namespace llm
