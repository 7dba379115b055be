// GGUF's blocks of 32 along k, as the file has them: integer sums within a block (exact), then in float,
// block after block, sum += float(products) * (d * scale), and for q4_1 sum += m * (scale * sum x).
#include <utility>

#include "epilogue.hpp"
#include "linear.hpp"

namespace llm {
namespace ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr int TILE_ROWS = 6;
#else
constexpr int TILE_ROWS = 1;
#endif
constexpr int BLOCK_STEPS = 64;       // blocks of k in one go: 35 to 70 KB of a panel
constexpr int ROWS = 16 * TILE_ROWS;  // that wait in `sums`

template <Format format>
constexpr bool BYTES = format == Format::q8_0;
template <Format format>
constexpr size_t QUANT_BYTES = (BYTES<format> ? BLOCK : BLOCK / 2) * HALF;  // of half a panel

// Cache lines that a tile of M rows asks for ahead in each block: all of a block, or half of it.
template <Format format, int M>
constexpr int AHEAD_LINES = M == 1 ? block_bytes(format) / 64 : (block_bytes(format) / 64 + 1) / 2;

// Quads 2 * j and 2 * j + 1 of half a panel.
template <Format format>
LLM_INLINE void load_quads(const uint8_t* quants, int j, I32& even, I32& odd) {
  if constexpr (BYTES<format>) {
    even = load_i32(quants + 128 * j);
    odd = load_i32(quants + 128 * j + 64);
  } else {
    const I32 both = load_i32(quants + 64 * j), mask = set1_i32(0x0f0f0f0f);
    even = and_bits(both, mask);
    odd = and_bits(shift_right_16<4>(both), mask);
  }
}

// Where a panel's rows go: row r to y + r * ldy.
struct Result {
  const Packed& weight;
  int panel;
  float* y;
  size_t ldy;
  Epilogue epilogue;
};

// `count` blocks of M rows times a panel, begun or (`first` false) continued from sums [M][PANEL]; they become
// the result if there is one, else they wait in `sums`.  `scales`: the first row's, of the first block.
template <Format format, int M>
void tile(const uint8_t* w, const uint8_t* x, const uint8_t* scales, size_t row_stride, int count, bool first,
          Ahead ahead, float* sums, const Result* result) {
  constexpr int QUADS = (M + 3) / 4;
  F32 acc[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
    for (int h = 0; h < 2; h++) acc[m][h] = first ? zero() : load(sums + m * PANEL + h * HALF);
  const uint8_t *rows[QUADS], *factors[QUADS];  // as in linear_words.cpp
#pragma GCC unroll 2
  for (int q = 0; q < QUADS; q++) {
    rows[q] = x + 4 * q * row_stride;
    factors[q] = scales + 4 * q * row_stride;
  }
  for (int b = 0; b < count; b++) {
#pragma GCC unroll 2
    for (int q = 0; q < QUADS; q++) {
      pin_address(rows[q]);
      pin_address(factors[q]);
    }
    if (ahead.step != 0) {
#pragma GCC unroll 17
      for (int i = 0; i < AHEAD_LINES<format, M>; i++) prefetch(ahead.lines + 64 * i);
      ahead.lines += ahead.step;
    }
    I32 dots[M][2];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      for (int h = 0; h < 2; h++)
        dots[m][h] = format == Format::q4_1 ? zero_i32() : broadcast(factors[m / 4] + m % 4 * row_stride + 4);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      I32 even[2], odd[2];
      for (int h = 0; h < 2; h++) load_quads<format>(w + h * QUANT_BYTES<format>, j, even[h], odd[h]);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const uint8_t* quads = rows[m / 4] + m % 4 * row_stride + 8 * j;
        const I32 first_quad = broadcast(quads);
        for (int h = 0; h < 2; h++) dots[m][h] = dot_u8s8(dots[m][h], even[h], first_quad);
        const I32 second_quad = broadcast(quads + 4);
        for (int h = 0; h < 2; h++) dots[m][h] = dot_u8s8(dots[m][h], odd[h], second_quad);
      }
    }
    const uint16_t* d = reinterpret_cast<const uint16_t*>(w + 2 * QUANT_BYTES<format>);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const F32 scale = load_f16(d + h * HALF);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        acc[m][h] = fma(to_float(dots[m][h]),
                        mul(scale, as_float(broadcast(factors[m / 4] + m % 4 * row_stride))), acc[m][h]);
      if constexpr (format == Format::q4_1) {
        const F32 minimum = load_f16(d + PANEL + h * HALF);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
          acc[m][h] = fma(minimum, as_float(broadcast(factors[m / 4] + m % 4 * row_stride + 4)), acc[m][h]);
      }
    }
    w += block_bytes(format);
#pragma GCC unroll 2
    for (int q = 0; q < QUADS; q++) {
      rows[q] += BLOCK;
      factors[q] += sizeof(BlockScale);
    }
  }
  if (result != nullptr) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      store_panel(result->weight, result->panel, acc[m][0], acc[m][1], result->y + m * result->ldy,
                  result->epilogue);
    return;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
    for (int h = 0; h < 2; h++) store(sums + m * PANEL + h * HALF, acc[m][h]);
}

using Tile = void (*)(const uint8_t*, const uint8_t*, const uint8_t*, size_t, int, bool, Ahead, float*, const Result*);

template <Format format, int... M>
const Tile* tiles(std::integer_sequence<int, M...>) {
  static constexpr Tile table[] = {tile<format, M + 1>...};
  return table;
}

// One group of rows computes while its own panel arrives, a little later; of several, the first ones ask for the
// next panel while this one is in the cache for all.
template <Format format>
Ahead look_ahead(const uint8_t* w, const uint8_t* next, int count, int group, int groups) {
  constexpr int asking = TILE_ROWS == 1 ? 1 : 2;
  constexpr size_t each = 64 * AHEAD_LINES<format, TILE_ROWS>;
  if (groups == 1) return {w + 2 * block_bytes(format), block_bytes(format)};
  if (next && group < asking) return {next + group * count * each, each};
  return {w, 0};
}

// A panel times at most ROWS rows; `next` is the panel that comes after, or null.
template <Format format>
void multiply_rows(const Packed& weight, const uint8_t* x, size_t row_stride, int rows, int panel,
                   const uint8_t* next, float* y, size_t ldy, Epilogue epilogue) {
  const Tile* table = tiles<format>(std::make_integer_sequence<int, TILE_ROWS>());
  const uint8_t* w = weight.data + panel * panel_bytes(format, weight.k);
  const int blocks = weight.k / BLOCK, groups = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const uint8_t* scales = x + scale_offset(weight.k);
  alignas(64) float sums[ROWS * PANEL];
  for (int begin = 0; begin < blocks; begin += BLOCK_STEPS) {
    const int count = blocks - begin < BLOCK_STEPS ? blocks - begin : BLOCK_STEPS;
    const size_t offset = begin * block_bytes(format);
    for (int g = 0; g < groups; g++) {
      const int top = rows * g / groups, height = rows * (g + 1) / groups - top;
      const Result result{weight, panel, y + top * ldy, ldy, epilogue};
      table[height - 1](w + offset, x + top * row_stride + begin * BLOCK,
                        scales + top * row_stride + begin * sizeof(BlockScale), row_stride, count, begin == 0,
                        look_ahead<format>(w + offset, next ? next + offset : nullptr, count, g, groups),
                        sums + top * PANEL, begin + count == blocks ? &result : nullptr);
    }
  }
}

template <Format format>
void multiply_panels(const Packed& weight, const uint8_t* x, int rows, int panel_begin, int panel_end,
                     float* y, size_t ldy, Epilogue epilogue) {
  const size_t stride = activation_bytes(format, weight.k), bytes = panel_bytes(format, weight.k);
  for (int panel = panel_begin; panel < panel_end; panel++) {
    const bool is_last = (panel + 1) * PANEL >= weight.n;  // else it is probably this thread's, too
    const uint8_t* next = is_last ? nullptr : weight.data + (panel + 1) * bytes;
    for (int r = 0; r < rows; r += ROWS)
      multiply_rows<format>(weight, x + r * stride, stride, rows - r < ROWS ? rows - r : ROWS, panel, next,
                            y + r * ldy, ldy, epilogue);
  }
}

}  // namespace

void multiply_blocks(const Packed& weight, const uint8_t* x, int rows, int panel_begin, int panel_end,
                     float* y, size_t ldy, Epilogue epilogue) {
  if (weight.format == Format::q8_0)
    multiply_panels<Format::q8_0>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
  else if (weight.format == Format::q4_0)
    multiply_panels<Format::q4_0>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
  else
    multiply_panels<Format::q4_1>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
}

}  // namespace ISA
}  // namespace llm
