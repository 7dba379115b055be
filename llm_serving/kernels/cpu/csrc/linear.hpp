// The parts of linear.cpp, one function an instruction set.
#pragma once

#include "layout.hpp"

namespace llm {
namespace ISA {

// Memory that a tile asks for while it computes, since it will be needed soon: some lines in each step.
struct Ahead {
  const uint8_t* lines;
  size_t step;
};

void quantize(Format, const float* x, size_t ldx, int rows, int k, uint8_t* activations);
size_t activation_bytes(Format, int k);

void multiply_words(const Packed&, const uint8_t* activations, int rows, int panel_begin, int panel_end,
                    float* y, size_t ldy, Epilogue);
void multiply_blocks(const Packed&, const uint8_t* activations, int rows, int panel_begin, int panel_end,
                     float* y, size_t ldy, Epilogue);

}  // namespace ISA
}  // namespace llm
