// What every instruction set offers: plain functions over pointers that work on a part of an operation.
//
// The caller divides an operation among threads; no function here starts one, allocates or throws.
// Rows are tokens.  All pointers of packed data are aligned to 64 bytes.
//
// Determinism.  Each output element has one canonical order of arithmetic, which every variant of a
// kernel keeps (one row, many rows, prefill, decode, any division among threads); it may differ between
// instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sampling_kernels.hpp"

namespace llm {

// ---------------------------------------------------------------- linear layers (linear.cpp)

enum class Format : int { f32 = 0, bf16 = 1, i8 = 2, q8_0 = 3, q4_0 = 4, q4_1 = 5 };

constexpr int PANEL = 32;  // output columns that are packed together; n is padded up to it

// A weight [n, k], packed by panels.  `data` is one piece of memory of packed_bytes(format, n, k).
struct Packed {
  Format format;
  int n, k;
  const uint8_t* data;
  const float* bias;  // [n] or null
};

enum class Epilogue : int {
  store = 0,     // y[row, col]  = value
  add = 1,       // y[row, col] += value               (the residual)
  // Gates and up-projections interleaved by half panels (16 of each): y[row, n / 2 columns]; n is a
  // multiple of PANEL.
  silu_mul = 2,
};

// What weights are packed from: rows of float32, of bfloat16, or of a GGUF file's own blocks.
enum class Source : int { f32 = 0, bf16 = 1, q8_0 = 2, q4_0 = 3, q4_1 = 4 };

// Bytes of a packed weight [n, k] and of one row of k values in a source (pack.cpp).  i8 needs k <= 65536
// (its sums are 32 bits), the block formats k in multiples of 32.
size_t packed_bytes(Format, int n, int k);
size_t source_bytes(Source, int k);
// Rows first .. first + count - 1 of [n, k] into `data`, which is packed_bytes long; whoever packs row n - 1
// also fills the padding.  A block format is packed from its own blocks only, the others from any source.
// Rows of different panels may be packed at the same time.
void pack_rows(Format, Source, const uint8_t* rows, int first, int count, int n, int k, uint8_t* data);

// Rows ids[0 .. count) of a source, as float32 [count, k].
void unpack_rows(Source, const uint8_t* rows, int k, const int32_t* ids, int count, float* values);

struct LinearKernels {
  // Bytes of one row of k activations in the form that `format` multiplies with (bf16, int8 with its
  // scale, int8 by blocks of 32 with scales and sums ...), a multiple of 64.
  size_t (*activation_bytes)(Format, int k);
  // x [rows, k] float32, rows ldx apart -> activations, one after the other.
  void (*quantize)(Format, const float* x, size_t ldx, int rows, int k, uint8_t* activations);
  // Panels [panel_begin, panel_end) of rows x weight^T + bias; y rows are ldy floats apart.
  void (*multiply)(const Packed&, const uint8_t* activations, int rows, int panel_begin, int panel_end,
                   float* y, size_t ldy, Epilogue);
};

// ---------------------------------------------------------------- elementwise (elementwise.cpp)

struct ElementwiseKernels {
  // y = x / sqrt(mean(x^2) + eps) * weight, one row (or head) of n; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* y);
  // residual += x, then y = rms_norm(residual); y may be x.
  void (*add_rms_norm)(const float* x, float* residual, const float* weight, float eps, int n, float* y);
  // One head of d at cos, sin [d] (first half of sin negated, see models.rope), in place.
  void (*rotate)(float* head, const float* cos, const float* sin, int d);
  // silu(gate) * up, n of each; y may be either.
  void (*silu_mul)(const float* gate, const float* up, int n, float* y);
};

// ---------------------------------------------------------------- attention (attention*.cpp)

constexpr int TILE = 16;    // positions that stand together in the cache
constexpr int PIECE = 256;  // positions whose attention is one partial result
constexpr int MAX_HEAD_DIM = 1024;

enum class KvFormat : int { f32 = 0, bf16 = 1, i8 = 2 };

// The cache of one layer.  Positions stand in tiles of 16 (block_size is a multiple of 16; block b holds
// tiles b * block_size / 16 ...).  Keys: [tile, kv head, d / 2, 16, 2] (bf16) or [tile, kv head, d, 16]
// (float32): a vector holds one (pair of) dimension(s) of 16 positions.  Values: [tile, kv head, 8, d, 2]
// (bf16, pairs of positions) or [tile, kv head, 16, d] (float32).  int8 lies as bf16 does, a byte a value, and
// behind each tile and head (at a multiple of 64 bytes) stand 16 float scales, one a position: a value is its
// byte times the scale.  What was never written may be NaN.
struct Cache {
  void* keys;
  void* values;
  int block_size, kv_heads, head_dim;
  KvFormat format;
};

// Where the scales of a tile and head begin (int8), and bytes of both.
constexpr size_t scales_offset(int head_dim) { return static_cast<size_t>(head_dim + 3) / 4 * 4 * TILE; }
constexpr size_t tile_bytes(KvFormat format, int head_dim) {
  if (format == KvFormat::i8) return scales_offset(head_dim) + TILE * sizeof(float);
  return static_cast<size_t>(head_dim) * TILE * (format == KvFormat::bf16 ? 2 : 4);
}

// Rows of a step; see interface.AttentionRows.
struct Rows {
  int num_rows;
  const int32_t* query_starts;  // [num_rows + 1]
  const int32_t* context_lens;  // [num_rows]
  const int32_t* block_tables;  // [num_rows, table_width]
  int table_width;
};

// What the projection of a step's tokens gave: heads x d queries, kv_heads x d keys and values a token.
struct Projected {
  float* query;  // normed (if query_norm), then rotated in place
  float* key;    // likewise
  const float* value;
  size_t stride;  // floats from one token to the next, of all three
  int heads;
  const float* query_norm;  // [d] weights of a norm per head (Qwen3), or null
  const float* key_norm;
  float eps;
  const float* cos;  // [max_model_len, d]
  const float* sin;
  const int32_t* positions;  // [tokens]
  const int32_t* slots;      // [tokens] block * block_size + offset
};

struct Attended {
  const float* query;  // [tokens, heads, d], rotated
  size_t query_stride;
  float* out;  // [tokens, heads, d]
  size_t out_stride;
  int heads;
  float scale;  // d ** -0.5
};

// Some tokens of a row and some pieces of their context: the unit of work, times the kv heads.
struct AttentionTile {
  int row;
  int first_token, num_tokens;  // of the step
  int first_position;           // of first_token in its sequence
  int piece_begin, piece_end;
  int64_t partial;  // first float of its partial results; -1: it has all pieces and writes the output
};

struct AttentionItem {
  const AttentionTile* tile;
  int kv_head;
};

// The tiles [tile_begin, tile_end) of one token range, whose partial results make its output.
struct AttentionSplit {
  int tile_begin, tile_end;
};

// A partial result: accumulators [rows, padded d], maxima [rows], sums [rows], rows = tokens x heads a kv
// head.  Floats of it, a multiple of 16:
constexpr size_t partial_floats(int rows, int head_dim) {
  const size_t padded = static_cast<size_t>(head_dim + 15) / 16 * 16;
  return (static_cast<size_t>(rows) * (padded + 2) + 15) / 16 * 16;
}

struct AttentionKernels {
  // Tokens [begin, end): norm, rotate, store keys and values.  Different tokens may be written at the same time.
  void (*write)(const Cache&, const Projected&, int begin, int end);
  // Bytes of scratch of one thread, aligned to 64.
  size_t (*scratch_bytes)(const Cache&, int heads);
  // One item.  Every key it sees has been written.  `next` is what the thread does then, whose first keys it
  // fetches (`item` again if there is none).  `partials` may be null if nothing is split.
  void (*attend)(const Cache&, const Rows&, const Attended&, const AttentionItem& item,
                 const AttentionItem& next, void* scratch, float* partials);
  // The output of a split, once all its tiles are attended.
  void (*combine)(const Cache&, const Attended&, const AttentionTile* tiles, AttentionSplit, int kv_head,
                  float* partials);
};

// ---------------------------------------------------------------- limits (limits.cpp)

// What one thread of this machine can do at most, for the percentages of the benchmarks.
struct LimitKernels {
  // Reads all of `size` bytes (a multiple of 1024) once; returns something that depends on them.
  int32_t (*read)(const uint8_t* data, size_t size);
  // Multiply-adds of a format (f32, bf16 or i8) from register to register; returns how many operations,
  // a multiply-add being two.
  double (*multiply)(Format, long steps);
};

struct Kernels {
  const char* name;
  LinearKernels linear;
  ElementwiseKernels elementwise;
  AttentionKernels attention;
  SamplingKernels sampling;
  LimitKernels limits;
};

// One function a source file and instruction set: avx2::linear_kernels(), avx512::linear_kernels(), ...
#define LLM_DECLARE(isa)                       \
  namespace isa {                              \
  LinearKernels linear_kernels();              \
  ElementwiseKernels elementwise_kernels();    \
  AttentionKernels attention_kernels();        \
  SamplingKernels sampling_kernels();          \
  LimitKernels limit_kernels();                \
  }
LLM_DECLARE(avx2)
LLM_DECLARE(avx512)
#undef LLM_DECLARE
// These have linear layers of their own (linear_tiles.cpp); the rest is avx512's.
namespace amx {
LinearKernels linear_kernels();
}
namespace amx_emulated {
LinearKernels linear_kernels();
}

}  // namespace llm
