// bfloat16 and int8 by channel through AMX's tiles; all else as with avx512.
//
// A block is up to 32 rows times a panel: two by two tiles of sums, over 16 words of k at a time.  Past the last
// word both sides are zero.  So the order of a bfloat16 output is dot_bf16's for every 32 values of k, one after
// the other, also of a single row: `amx` has bits of its own there.  int8 is exact, and one row of it is not worth
// a tile.
//
// Untested on a processor that has AMX.  Everything but the instructions in tiles.hpp is tested with their
// emulation; sizes of blocks and prefetching (there is none) wait for measurements.
#include <algorithm>

#include "epilogue.hpp"
#include "tiles.hpp"

namespace llm {
namespace ISA {
namespace {

constexpr int WORDS = MAX_TILE_BYTES / 4;     // of k, that a tile holds
constexpr int BLOCK_ROWS = 2 * MAX_TILE_ROWS;
constexpr size_t WORD_BYTES = 4 * PANEL;      // of a panel
static_assert(PANEL == 2 * WORDS && WORDS == MAX_TILE_ROWS && HALF == LANES);

// The tiles by number: sums, rows of activations, halves of a panel.
enum : int { TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT, TOP, BOTTOM, LEFT, RIGHT };

void configure_rows(int rows) {
  TileShapes shapes;
  const int top = std::min(rows, MAX_TILE_ROWS);
  const auto set = [&](int tile, int tile_rows) {
    shapes.rows[tile] = static_cast<uint8_t>(tile_rows);
    shapes.row_bytes[tile] = tile_rows > 0 ? MAX_TILE_BYTES : 0;
  };
  for (int tile : {TOP_LEFT, TOP_RIGHT, TOP}) set(tile, top);
  for (int tile : {BOTTOM_LEFT, BOTTOM_RIGHT, BOTTOM}) set(tile, rows - top);
  for (int tile : {LEFT, RIGHT}) set(tile, WORDS);
  configure(shapes);
}

struct BFloat16 {
  template <int sums, int x, int w>
  LLM_INLINE void dot() {
    dot_bf16<sums, x, w>();
  }
  explicit BFloat16(const Packed&, int) {}
  F32 finish(const float* sums, int, const uint8_t*) const { return load(sums); }
};

struct Int8 : ChannelScales {
  template <int sums, int x, int w>
  LLM_INLINE void dot() {
    dot_s8u8<sums, x, w>();
  }
  using ChannelScales::ChannelScales;
  F32 finish(const float* sums, int half, const uint8_t* scale) const {
    const RowScale& row = *reinterpret_cast<const RowScale*>(scale);
    return ChannelScales::finish(add_i32(load_i32(sums), correction(row)), half, row);
  }
};

template <class Op, bool has_bottom>
LLM_INLINE void add_words(const uint8_t* w, const uint8_t* x, size_t row_stride) {
  load_tile<LEFT>(w, WORD_BYTES);
  load_tile<RIGHT>(w + WORD_BYTES / 2, WORD_BYTES);
  load_tile<TOP>(x, row_stride);
  Op::template dot<TOP_LEFT, TOP, LEFT>();
  Op::template dot<TOP_RIGHT, TOP, RIGHT>();
  if constexpr (has_bottom) {
    load_tile<BOTTOM>(x + MAX_TILE_ROWS * row_stride, row_stride);
    Op::template dot<BOTTOM_LEFT, BOTTOM, LEFT>();
    Op::template dot<BOTTOM_RIGHT, BOTTOM, RIGHT>();
  }
}

// Of a panel and `rows` rows, for which tiles are configured, into sums [rows][PANEL] (float or int32).
template <class Op, bool has_bottom>
void sum_block(const uint8_t* w, const uint8_t* x, size_t row_stride, int rows, int num_words, float* sums) {
  zero_tile<TOP_LEFT>();
  zero_tile<TOP_RIGHT>();
  if constexpr (has_bottom) {
    zero_tile<BOTTOM_LEFT>();
    zero_tile<BOTTOM_RIGHT>();
  }
  for (int i = 0; i < num_words / WORDS; i++) {
    add_words<Op, has_bottom>(w, x, row_stride);
    w += WORDS * WORD_BYTES;
    x += MAX_TILE_BYTES;
  }
  if (const int rest = num_words % WORDS; rest > 0) {
    alignas(64) uint8_t last_w[WORDS * WORD_BYTES] = {};
    alignas(64) uint8_t last_x[BLOCK_ROWS * MAX_TILE_BYTES] = {};
    std::memcpy(last_w, w, rest * WORD_BYTES);
    for (int r = 0; r < rows; r++) std::memcpy(last_x + r * MAX_TILE_BYTES, x + r * row_stride, 4 * rest);
    add_words<Op, has_bottom>(last_w, last_x, MAX_TILE_BYTES);
  }
  store_tile<TOP_LEFT>(sums, WORD_BYTES);
  store_tile<TOP_RIGHT>(sums + HALF, WORD_BYTES);
  if constexpr (has_bottom) {
    store_tile<BOTTOM_LEFT>(sums + MAX_TILE_ROWS * PANEL, WORD_BYTES);
    store_tile<BOTTOM_RIGHT>(sums + MAX_TILE_ROWS * PANEL + HALF, WORD_BYTES);
  }
}

const LinearKernels& plain() {
  static const LinearKernels kernels = avx512::linear_kernels();
  return kernels;
}

// Tiles are released at the end of each call: a thread may be anybody's (the first of a pool is Python's), and
// what it does next should not carry 8 KB of tiles through every switch.
template <class Op>
void multiply_panels(const Packed& weight, const uint8_t* x, int rows, int panel_begin, int panel_end, float* y,
                     size_t ldy, Epilogue epilogue) {
  const size_t stride = plain().activation_bytes(weight.format, weight.k);
  const size_t bytes = panel_bytes(weight.format, weight.k);
  const int num_words = words(weight.format, weight.k);
  alignas(64) float sums[BLOCK_ROWS * PANEL];
  int configured = 0;
  for (int panel = panel_begin; panel < panel_end; panel++) {
    const Op columns(weight, panel);
    for (int first = 0; first < rows; first += BLOCK_ROWS) {
      const int height = std::min(rows - first, BLOCK_ROWS);
      if (height != configured) configure_rows(configured = height);
      const auto sum = height > MAX_TILE_ROWS ? sum_block<Op, true> : sum_block<Op, false>;
      sum(weight.data + panel * bytes, x + first * stride, stride, height, num_words, sums);
      for (int r = 0; r < height; r++) {
        const uint8_t* scale = x + (first + r) * stride + scale_offset(weight.k);
        const float* of_row = sums + r * PANEL;
        store_panel(weight, panel, columns.finish(of_row, 0, scale), columns.finish(of_row + HALF, 1, scale),
                    y + (first + r) * ldy, epilogue);
      }
    }
  }
  if (configured > 0) release();
}

void multiply(const Packed& weight, const uint8_t* x, int rows, int panel_begin, int panel_end, float* y,
              size_t ldy, Epilogue epilogue) {
  if (weight.format == Format::bf16)
    return multiply_panels<BFloat16>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
  if (weight.format == Format::i8 && rows > 1)
    return multiply_panels<Int8>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
  plain().multiply(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
}

}  // namespace

LinearKernels linear_kernels() { return {plain().activation_bytes, plain().quantize, multiply}; }

}  // namespace ISA
}  // namespace llm
