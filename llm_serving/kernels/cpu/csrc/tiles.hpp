// Tiles of up to 16 rows of 64 bytes: AMX's instructions, or with -DEMULATE_TILES what they do in plain C++.
//
// Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, under the instructions' names.
//
//   configure(shapes)       LDTILECFG: the shape of each tile of this thread, all of which become zero
//   release()               TILERELEASE: no tile is in use, and a switch of threads saves none
//   zero_tile<t>()          TILEZERO
//   load_tile<t>(p, s)      TILELOADD: rows that are s bytes apart
//   store_tile<t>(p, s)     TILESTORED
//   dot_bf16<c, a, b>()     TDPBF16PS: c += a b.  A row of a holds pairs along k, row k of b one pair a column.
//                           For an element: the sum of the products of the pairs' first values, by fused
//                           multiply-adds from 0 on, then the same of their second values; the two are added,
//                           and that to c.  Every step rounds to nearest even; denormals are zero, as values
//                           and as results, whatever MXCSR says.
//   dot_s8u8<c, a, b>()     TDPBSUD: the same of signed times unsigned bytes by fours, exact (mod 2^32)
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vec.hpp"

namespace llm {
namespace ISA {

constexpr int MAX_TILES = 8, MAX_TILE_ROWS = 16, MAX_TILE_BYTES = 64;  // of palette 1

// What LDTILECFG reads.  A tile of no rows and no bytes is not to be used.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // the last eight are reserved
  uint8_t rows[16] = {};        // likewise
};
static_assert(sizeof(TileShapes) == 64);

#if !defined(EMULATE_TILES)

// Not the compiler's intrinsics: GCC's want the number of a tile as a literal, and do not say that a load or a
// configuration reads memory.
LLM_INLINE void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
LLM_INLINE void release() { asm volatile("tilerelease"); }
template <int t>
LLM_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
LLM_INLINE void load_tile(const void* p, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
LLM_INLINE void store_tile(void* p, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int c, int a, int b>
LLM_INLINE void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
LLM_INLINE void dot_s8u8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct Tile {
  uint32_t words[MAX_TILE_ROWS][MAX_TILE_BYTES / 4];
};

// Where the instruction would fault, the emulation ends the process, too.
struct Tiles {
  TileShapes shapes;
  Tile tiles[MAX_TILES];

  static void demand(bool good) {
    if (!good) __builtin_trap();
  }
  Tile& used(int t) {
    demand(shapes.palette == 1 && shapes.rows[t] > 0);
    return tiles[t];
  }
};
static thread_local Tiles mine = {.shapes = {.palette = 0}, .tiles = {}};

static inline void configure(const TileShapes& shapes) {
  Tiles::demand(shapes.palette == 1 && shapes.start_row == 0);
  for (uint8_t byte : shapes.reserved) Tiles::demand(byte == 0);
  for (int t = 0; t < 16; t++) {
    Tiles::demand(shapes.rows[t] <= MAX_TILE_ROWS && shapes.row_bytes[t] <= MAX_TILE_BYTES);
    Tiles::demand((shapes.rows[t] == 0) == (shapes.row_bytes[t] == 0) && (t < MAX_TILES || shapes.rows[t] == 0));
  }
  mine = {.shapes = shapes, .tiles = {}};
}
static inline void release() { mine.shapes.palette = 0; }
template <int t>
void zero_tile() {
  mine.used(t) = {};
}
template <int t>
void load_tile(const void* p, size_t stride) {
  Tile& tile = mine.used(t) = {};
  for (int r = 0; r < mine.shapes.rows[t]; r++)
    std::memcpy(tile.words[r], static_cast<const uint8_t*>(p) + r * stride, mine.shapes.row_bytes[t]);
}
template <int t>
void store_tile(void* p, size_t stride) {
  const Tile& tile = mine.used(t);
  for (int r = 0; r < mine.shapes.rows[t]; r++)
    std::memcpy(static_cast<uint8_t*>(p) + r * stride, tile.words[r], mine.shapes.row_bytes[t]);
}

struct Operands {
  Tile& c;
  const Tile& a;
  const Tile& b;
  int rows, depth, columns;
};

template <int c, int a, int b>
Operands operands() {
  const TileShapes& s = mine.shapes;
  const Operands found{mine.used(c), mine.used(a), mine.used(b), s.rows[c], s.row_bytes[a] / 4, s.row_bytes[c] / 4};
  Tiles::demand(c != a && c != b && a != b && s.rows[a] == s.rows[c] && s.row_bytes[b] == s.row_bytes[c]);
  Tiles::demand(s.rows[b] == found.depth && s.row_bytes[a] % 4 == 0 && s.row_bytes[c] % 4 == 0);
  return found;
}

static inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline float first_bf16(uint32_t pair) { return float_of(pair << 16); }
static inline float second_bf16(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// A call of its own, since the compiler does not know that MXCSR matters to arithmetic.
[[gnu::noipa]] static void add_dots_bf16(const Operands& of) {
  for (int m = 0; m < of.rows; m++) {
    float first[MAX_TILE_BYTES / 4] = {}, second[MAX_TILE_BYTES / 4] = {};
    for (int k = 0; k < of.depth; k++) {
      const uint32_t x = of.a.words[m][k];
      for (int n = 0; n < of.columns; n++) {
        first[n] = __builtin_fmaf(first_bf16(x), first_bf16(of.b.words[k][n]), first[n]);
        second[n] = __builtin_fmaf(second_bf16(x), second_bf16(of.b.words[k][n]), second[n]);
      }
    }
    for (int n = 0; n < of.columns; n++)
      of.c.words[m][n] = __builtin_bit_cast(uint32_t, float_of(of.c.words[m][n]) + (first[n] + second[n]));
  }
}

template <int c, int a, int b>
void dot_bf16() {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);  // nearest, no exceptions
  add_dots_bf16(operands<c, a, b>());
  _mm_setcsr(before);
}

template <int c, int a, int b>
void dot_s8u8() {
  const Operands of = operands<c, a, b>();
  for (int m = 0; m < of.rows; m++)
    for (int k = 0; k < of.depth; k++)
      for (int n = 0; n < of.columns; n++)
        for (int shift = 0; shift < 32; shift += 8)
          of.c.words[m][n] += static_cast<uint32_t>(static_cast<int8_t>(of.a.words[m][k] >> shift)) *
                              static_cast<uint8_t>(of.b.words[k][n] >> shift);
}

#endif

}  // namespace ISA
}  // namespace llm
