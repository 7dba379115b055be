// Weights into panels, once when a model is loaded.  Layouts: layout.hpp.
#include <cmath>
#include <cstring>
#include <vector>

#include "layout.hpp"

namespace llm {
namespace {

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_f16(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  float value = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                : exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x & 0x8000 ? -value : value;
}

// A block of a GGUF file: 32 quants as unsigned numbers, value = d * (quant - offset) + m.
struct Block {
  uint8_t quants[BLOCK];
  uint16_t d, m;
  int offset;
};

size_t source_block_bytes(Source source) {
  return source == Source::q8_0 ? 34 : source == Source::q4_0 ? 18 : 20;
}

Block read_block(Source source, const uint8_t* p) {
  Block block{};
  std::memcpy(&block.d, p, 2);
  p += 2;
  if (source == Source::q8_0) {
    block.offset = 128;
    for (int i = 0; i < BLOCK; i++) block.quants[i] = p[i] ^ 0x80;
    return block;
  }
  if (source == Source::q4_0) block.offset = 8;
  if (source == Source::q4_1) {
    std::memcpy(&block.m, p, 2);
    p += 2;
  }
  for (int i = 0; i < BLOCK / 2; i++) {
    block.quants[i] = p[i] & 15;
    block.quants[i + BLOCK / 2] = p[i] >> 4;
  }
  return block;
}

void read_row(Source source, const uint8_t* row, int k, float* values) {
  if (source == Source::f32) {
    std::memcpy(values, row, sizeof(float) * k);
    return;
  }
  if (source == Source::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(row);
    for (int i = 0; i < k; i++) values[i] = from_bf16(from[i]);
    return;
  }
  for (int b = 0; b < k / BLOCK; b++) {
    const Block block = read_block(source, row + b * source_block_bytes(source));
    const float d = from_f16(block.d), m = from_f16(block.m);
    for (int i = 0; i < BLOCK; i++) values[b * BLOCK + i] = d * (block.quants[i] - block.offset) + m;
  }
}

// One column of a panel of words; values has words() * 4 bytes' worth of numbers, zero from k on.
void write_f32(const float* values, int num_words, uint8_t* column) {
  for (int w = 0; w < num_words; w++) std::memcpy(column + w * 4 * PANEL, values + w, 4);
}

void write_bf16(const float* values, int num_words, uint8_t* column) {
  for (int w = 0; w < num_words; w++) {
    const uint16_t pair[2] = {to_bf16(values[2 * w]), to_bf16(values[2 * w + 1])};
    std::memcpy(column + w * 4 * PANEL, pair, 4);
  }
}

// Symmetric, one scale for the column: w = scale * (byte - 128).
void write_i8(const float* values, int num_words, uint8_t* column, float* scale, int32_t* sum) {
  float largest = 0;
  for (int i = 0; i < 4 * num_words; i++) largest = std::fmax(largest, std::fabs(values[i]));
  *scale = largest / 127;
  *sum = 0;
  const float inverse = largest > 0 ? 127 / largest : 0;
  for (int w = 0; w < num_words; w++) {
    uint8_t quad[4];
    for (int i = 0; i < 4; i++) {
      const int q = static_cast<int>(std::nearbyint(values[4 * w + i] * inverse));
      *sum += q;
      quad[i] = static_cast<uint8_t>(q + 128);
    }
    std::memcpy(column + w * 4 * PANEL, quad, 4);
  }
}

void write_block(Format format, const Block& block, int column, uint8_t* to) {
  const bool bytes = format == Format::q8_0;
  uint8_t* half = to + column / HALF * (bytes ? BLOCK : BLOCK / 2) * HALF + column % HALF * 4;
  for (int i = 0; i < BLOCK; i++) {
    if (bytes) half[i / 4 * 64 + i % 4] = block.quants[i];
    else if (i / 4 % 2 == 0) half[i / 8 * 64 + i % 4] = block.quants[i] | block.quants[i + 4] << 4;
  }
  uint8_t* scales = to + (bytes ? BLOCK : BLOCK / 2) * PANEL;
  std::memcpy(scales + 2 * column, &block.d, 2);
  if (format == Format::q4_1) std::memcpy(scales + 2 * (PANEL + column), &block.m, 2);
}

void pack_blocks(Format format, Source source, const uint8_t* row, int k, int column, uint8_t* panel) {
  for (int b = 0; b < k / BLOCK; b++) {
    const Block block = row ? read_block(source, row + b * source_block_bytes(source)) : Block{};
    write_block(format, block, column, panel + b * block_bytes(format));
  }
}

void pack_words(Format format, const float* values, int k, int column, uint8_t* panel) {
  const int num_words = words(format, k);
  uint8_t* to = panel + 4 * column;
  if (format == Format::f32) return write_f32(values, num_words, to);
  if (format == Format::bf16) return write_bf16(values, num_words, to);
  float* scales = reinterpret_cast<float*>(panel + static_cast<size_t>(num_words) * 4 * PANEL);
  write_i8(values, num_words, to, scales + column, reinterpret_cast<int32_t*>(scales + PANEL) + column);
}

}  // namespace

size_t packed_bytes(Format format, int n, int k) {
  return round_up(n, PANEL) / PANEL * panel_bytes(format, k);
}

size_t source_bytes(Source source, int k) {
  if (source == Source::f32) return sizeof(float) * k;
  return source == Source::bf16 ? 2 * static_cast<size_t>(k) : k / BLOCK * source_block_bytes(source);
}

void pack_rows(Format format, Source source, const uint8_t* rows, int first, int count, int n, int k,
               uint8_t* data) {
  const size_t row_bytes = source_bytes(source, k);
  std::vector<float> values(in_blocks(format) ? 0 : 4 * words(format, k));
  const int end = first + count == n ? static_cast<int>(round_up(n, PANEL)) : first + count;
  for (int r = first; r < end; r++) {
    uint8_t* panel = data + r / PANEL * panel_bytes(format, k);
    const uint8_t* row = r < n ? rows + (r - first) * row_bytes : nullptr;
    if (in_blocks(format)) {
      pack_blocks(format, source, row, k, r % PANEL, panel);
      continue;
    }
    if (row) read_row(source, row, k, values.data());
    else values.assign(values.size(), 0.0f);
    pack_words(format, values.data(), k, r % PANEL, panel);
  }
}

void unpack_rows(Source source, const uint8_t* rows, int k, const int32_t* ids, int count, float* values) {
  const size_t row_bytes = source_bytes(source, k);
  for (int i = 0; i < count; i++) read_row(source, rows + ids[i] * row_bytes, k, values + static_cast<size_t>(i) * k);
}

}  // namespace llm
