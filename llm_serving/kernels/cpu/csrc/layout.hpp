// Where things lie in packed weights and in quantised activations.
//
// A panel is 32 output columns, two halves of 16.  Along k the formats differ:
//
//   f32, bf16, i8    words of 4 bytes (1 float, 2 bf16, 4 int8): [word][32 columns][4 bytes]; after the words
//                    of an i8 panel the 32 scales (float) and the 32 sums over k of the weights (int32)
//   q8_0 q4_0 q4_1   blocks of 32: [block] { [half][quads][16 columns][4 bytes], d[32], q4_1: m[32] } with d, m
//                    float16.  A quad is 4 values of k; a byte of 4-bit formats holds a value of an even
//                    quad and, in its upper half, that of the next quad.
//
// 8-bit weights are stored as w + 128, since the instruction multiplies unsigned by signed bytes:
// sum (w + 128) x = sum w x + 128 sum x, and the last term belongs to the row alone.
//
// Activations, row by row: f32 and bf16 as they are; i8 bytes, then `RowScale`; block formats bytes, then for each
// block its scale (float) and what is added: int32 -128 sum x (q8_0), -8 sum x (q4_0), float scale * sum x (q4_1,
// which m is multiplied with).
#pragma once

#include "kernels.hpp"

namespace llm {

constexpr int HALF = 16;
constexpr int BLOCK = 32;

struct RowScale {
  float scale;   // x = scale * (q - zero)
  int32_t zero;
  int32_t sum;   // of q
};

struct BlockScale {
  float scale;
  union {  // what is added
    float product;
    uint32_t sum;
  };
};

static inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

static inline bool in_blocks(Format format) { return static_cast<int>(format) >= static_cast<int>(Format::q8_0); }

// Words of 4 bytes along k.
static inline int words(Format format, int k) {
  if (format == Format::f32) return k;
  return format == Format::bf16 ? (k + 1) / 2 : (k + 3) / 4;
}

static constexpr size_t block_bytes(Format format) {
  if (format == Format::q8_0) return BLOCK * PANEL + 2 * PANEL;
  return BLOCK * PANEL / 2 + (format == Format::q4_0 ? 2 : 4) * PANEL;
}

static inline size_t panel_bytes(Format format, int k) {
  if (in_blocks(format)) return k / BLOCK * block_bytes(format);
  return static_cast<size_t>(words(format, k)) * 4 * PANEL + (format == Format::i8 ? 8 * PANEL : 0);
}

// Offset of RowScale, or of the blocks' scales, in a row of activations.
static inline size_t scale_offset(int k) { return round_up(k, 64); }

}  // namespace llm
