// float32, bfloat16 and int8 by channel: one accumulator for each output element, over k from first to last.
//
// A tile is a few rows times a few panels with every accumulator in a register.  Between blocks of k the
// accumulators wait in `sums`, which changes no bit, so a block of a panel stays in the cache for all rows.
#include <utility>

#include "epilogue.hpp"
#include "linear.hpp"

namespace llm {
namespace ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr int TILE_ROWS = 12, WIDE = 4;
#else
constexpr int TILE_ROWS = 3, WIDE = 1;
#endif
constexpr int BLOCK_WORDS = 512;           // of k: 64 KB of a panel
constexpr int ROWS = 8 * TILE_ROWS;        // that wait in `sums`
constexpr size_t WORD_BYTES = 4 * PANEL;   // of a panel

// Where a panel's rows go: row r to y + r * ldy, with the activations' RowScale `scales` + r * row_stride.
struct Result {
  const Packed& weight;
  int panel;
  const uint8_t* scales;
  size_t row_stride;
  float* y;
  size_t ldy;
  Epilogue epilogue;

  Result from_row(int r) const {
    return {weight, panel, scales + r * row_stride, row_stride, y + r * ldy, ldy, epilogue};
  }
};

struct Float32 {
  using Sum = F32;
  LLM_INLINE Sum start(const uint8_t*) { return zero(); }
  LLM_INLINE Sum resume(const float* p) { return load(p); }
  LLM_INLINE void keep(float* p, Sum v) { store(p, v); }
  LLM_INLINE Sum step(Sum sum, I32 w, I32 x) { return fma(as_float(w), as_float(x), sum); }

  // What a panel's columns have in common.
  explicit Float32(const Result&, int) {}
  [[gnu::always_inline]] F32 finish(Sum sum, int, const uint8_t*) const { return sum; }
};

struct BFloat16 : Float32 {
  using Float32::Float32;
  LLM_INLINE Sum step(Sum sum, I32 w, I32 x) { return dot_bf16(sum, w, x); }
};

struct Int8 : ChannelScales {
  using Sum = I32;
  LLM_INLINE const RowScale& row(const uint8_t* scale) { return *reinterpret_cast<const RowScale*>(scale); }
  LLM_INLINE Sum start(const uint8_t* scale) { return correction(row(scale)); }
  LLM_INLINE Sum resume(const float* p) { return load_i32(p); }
  LLM_INLINE void keep(float* p, Sum v) { store_i32(p, v); }
  LLM_INLINE Sum step(Sum sum, I32 w, I32 x) { return dot_u8s8(sum, w, x); }

  explicit Int8(const Result& result, int panel) : ChannelScales(result.weight, panel) {}
  [[gnu::always_inline]] F32 finish(Sum sum, int half, const uint8_t* scale) const {
    return ChannelScales::finish(sum, half, row(scale));
  }
};

// `count` words of M rows times P panels, begun or (`first` false) continued from sums [M][P * PANEL]; they
// become the result if there is one, else they wait in `sums`.
template <class Op, int M, int P>
void tile(const uint8_t* w, size_t panel_stride, const uint8_t* x, const uint8_t* scales, size_t row_stride,
          int count, bool first, Ahead ahead, float* sums, const Result* result) {
  typename Op::Sum acc[M][2 * P];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; v++)
      acc[m][v] = first ? Op::start(scales + m * row_stride) : Op::resume(sums + m * P * PANEL + v * HALF);
  const uint8_t* quads[(M + 3) / 4];  // of rows: three addresses and three strides leave registers for the rest
#pragma GCC unroll 4
  for (int q = 0; q < (M + 3) / 4; q++) quads[q] = x + 4 * q * row_stride;
  for (int i = 0; i < count; i++) {
    prefetch(ahead.lines);
    ahead.lines += ahead.step;
    I32 weights[2 * P];
#pragma GCC unroll 4
    for (int q = 0; q < (M + 3) / 4; q++) pin_address(quads[q]);
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; v++) weights[v] = load_i32(w + v / 2 * panel_stride + v % 2 * 64);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const I32 word = broadcast(quads[m / 4] + m % 4 * row_stride);
#pragma GCC unroll 8
      for (int v = 0; v < 2 * P; v++) acc[m][v] = Op::step(acc[m][v], weights[v], word);
    }
    w += WORD_BYTES;
#pragma GCC unroll 4
    for (int q = 0; q < (M + 3) / 4; q++) quads[q] += 4;
  }
  if (result == nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < 2 * P; v++) Op::keep(sums + m * P * PANEL + v * HALF, acc[m][v]);
    return;
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) {
    const Op columns(*result, result->panel + p);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const uint8_t* scale = result->scales + m * result->row_stride;
      store_panel(result->weight, result->panel + p, columns.finish(acc[m][2 * p], 0, scale),
                  columns.finish(acc[m][2 * p + 1], 1, scale), result->y + m * result->ldy, result->epilogue);
    }
  }
}

using Tile = void (*)(const uint8_t*, size_t, const uint8_t*, const uint8_t*, size_t, int, bool, Ahead, float*,
                      const Result*);

// tiles[m - 1] has m rows and one panel; wide[p - 1] one row and p panels.
template <class Op, int... M>
const Tile* tiles(std::integer_sequence<int, M...>) {
  static constexpr Tile table[] = {tile<Op, M + 1, 1>...};
  return table;
}
template <class Op, int... P>
const Tile* wide(std::integer_sequence<int, P...>) {
  static constexpr Tile table[] = {tile<Op, 1, P + 1>...};
  return table;
}

// One row: several panels at once, to have enough independent sums.
template <class Op>
void multiply_row(const Packed& weight, const uint8_t* x, int panel_begin, int panel_end, float* y,
                  Epilogue epilogue) {
  const Tile* table = wide<Op>(std::make_integer_sequence<int, WIDE>());
  const size_t bytes = panel_bytes(weight.format, weight.k);
  const uint8_t* scale = x + scale_offset(weight.k);
  for (int panel = panel_begin; panel < panel_end;) {
    const int left = panel_end - panel, width = left < WIDE ? left : WIDE;
    const Result result{weight, panel, scale, 0, y, 0, epilogue};
    table[width - 1](weight.data + panel * bytes, bytes, x, scale, 0, words(weight.format, weight.k), true,
                     {x, 0}, nullptr, &result);
    panel += width;
  }
}

// One group of rows computes while its own panel arrives, a little later; of several, the first ones (at
// most four) ask for the next panel while this one is in the cache for all.  `w` and `next` (or null): `count`
// words of the panels.
Ahead look_ahead(const uint8_t* w, const uint8_t* next, int count, int group, int groups) {
  if (groups == 1) return {w + 1024, WORD_BYTES};
  const int asking = groups < 4 ? groups : 4;
  const size_t each = WORD_BYTES / asking;
  if (next && group < asking) return {next + group * count * each, each};
  return {w, 0};
}

// A panel times at most ROWS rows; `next` is the panel that comes after, or null.
template <class Op>
void multiply_rows(const Packed& weight, const uint8_t* x, size_t row_stride, int rows, int panel,
                   const uint8_t* next, float* y, size_t ldy, Epilogue epilogue) {
  const Tile* table = tiles<Op>(std::make_integer_sequence<int, TILE_ROWS>());
  const uint8_t* w = weight.data + panel * panel_bytes(weight.format, weight.k);
  const int num_words = words(weight.format, weight.k), groups = (rows + TILE_ROWS - 1) / TILE_ROWS;
  alignas(64) float sums[ROWS * PANEL];
  const uint8_t* scales = x + scale_offset(weight.k);
  const Result whole{weight, panel, scales, row_stride, y, ldy, epilogue};
  for (int begin = 0; begin < num_words; begin += BLOCK_WORDS) {
    const int count = num_words - begin < BLOCK_WORDS ? num_words - begin : BLOCK_WORDS;
    const size_t offset = begin * WORD_BYTES;
    for (int g = 0; g < groups; g++) {
      const int top = rows * g / groups, height = rows * (g + 1) / groups - top;
      const Result result = whole.from_row(top);
      table[height - 1](w + offset, 0, x + top * row_stride + 4 * begin, scales + top * row_stride, row_stride,
                        count, begin == 0,
                        look_ahead(w + offset, next ? next + offset : nullptr, count, g, groups),
                        sums + top * PANEL, begin + count == num_words ? &result : nullptr);
    }
  }
}

template <class Op>
void multiply_panels(const Packed& weight, const uint8_t* x, int rows, int panel_begin, int panel_end,
                     float* y, size_t ldy, Epilogue epilogue) {
  if (rows == 1) return multiply_row<Op>(weight, x, panel_begin, panel_end, y, epilogue);
  const size_t stride = activation_bytes(weight.format, weight.k);
  const size_t bytes = panel_bytes(weight.format, weight.k);
  for (int panel = panel_begin; panel < panel_end; panel++) {
    const bool is_last = (panel + 1) * PANEL >= weight.n;  // else it is probably this thread's, too
    const uint8_t* next = is_last ? nullptr : weight.data + (panel + 1) * bytes;
    for (int r = 0; r < rows; r += ROWS)
      multiply_rows<Op>(weight, x + r * stride, stride, rows - r < ROWS ? rows - r : ROWS, panel, next,
                        y + r * ldy, ldy, epilogue);
  }
}

}  // namespace

void multiply_words(const Packed& weight, const uint8_t* x, int rows, int panel_begin, int panel_end,
                    float* y, size_t ldy, Epilogue epilogue) {
  if (weight.format == Format::f32)
    multiply_panels<Float32>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
  else if (weight.format == Format::bf16)
    multiply_panels<BFloat16>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
  else
    multiply_panels<Int8>(weight, x, rows, panel_begin, panel_end, y, ldy, epilogue);
}

}  // namespace ISA
}  // namespace llm
