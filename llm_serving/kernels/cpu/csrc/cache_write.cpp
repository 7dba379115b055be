// New tokens into the cache: norm per head, rotation, and the tiles' layout (see kernels.hpp).
#include <algorithm>

#include "elementwise.hpp"
#include "kernels.hpp"

namespace llm {
namespace ISA {
namespace {

// Plain stores of a token's own bytes: the other half of a pair may be written by another thread.
void store_key(char* tile, int place, const float* key, int d, bool bf16) {
  if (!bf16) {
    for (int i = 0; i < d; i++) std::memcpy(tile + i * 64 + place * 4, key + i, 4);
    return;
  }
  uint16_t rounded[LANES];
  for (int i = 0; i < d; i += LANES) {
    const int count = std::min(d - i, LANES);
    round_bf16(rounded, load(key + i, count));
    for (int j = 0; j < count; j += 2) std::memcpy(tile + (i + j) * 32 + place * 4, rounded + j, 4);
  }
}

void store_value(char* tile, int place, const float* value, int d, bool bf16) {
  if (!bf16) {
    std::memcpy(tile + static_cast<size_t>(place) * d * 4, value, static_cast<size_t>(d) * 4);
    return;
  }
  uint16_t* to = reinterpret_cast<uint16_t*>(tile) + static_cast<size_t>(place / 2) * d * 2 + place % 2;
  uint16_t rounded[LANES];
  for (int i = 0; i < d; i += LANES) {
    const int count = std::min(d - i, LANES);
    round_bf16(rounded, load(value + i, count));
    for (int j = 0; j < count; j++) to[(i + j) * 2] = rounded[j];
  }
}

// The lines that a token's keys and values go to: they are in memory, and each is another one.
void fetch_lines(const Cache& cache, int slot, size_t tile_bytes) {
  const size_t offset = static_cast<size_t>(slot / TILE) * cache.kv_heads * tile_bytes;
  const char* keys = static_cast<const char*>(cache.keys) + offset;
  for (size_t i = 0; i < cache.kv_heads * tile_bytes; i += 64) __builtin_prefetch(keys + i, 1);
  const size_t row_bytes = tile_bytes / (cache.bf16 ? TILE / 2 : TILE);
  const size_t row = slot % TILE / (cache.bf16 ? 2 : 1) * row_bytes;
  for (int h = 0; h < cache.kv_heads; h++)
    for (size_t i = 0; i < row_bytes; i += 64)
      __builtin_prefetch(static_cast<const char*>(cache.values) + offset + h * tile_bytes + row + i, 1);
}

}  // namespace

void write(const Cache& cache, const Projected& in, int begin, int end) {
  const int d = cache.head_dim;
  const size_t tile_bytes = static_cast<size_t>(d) * TILE * (cache.bf16 ? 2 : 4);
  fetch_lines(cache, in.slots[begin], tile_bytes);
  for (int token = begin; token < end; token++) {
    if (token + 1 < end && in.slots[token + 1] / TILE != in.slots[token] / TILE)
      fetch_lines(cache, in.slots[token + 1], tile_bytes);
    float* query = in.query + token * in.stride;
    float* key = in.key + token * in.stride;
    const float* value = in.value + token * in.stride;
    const float* cos = in.cos + static_cast<size_t>(in.positions[token]) * d;
    const float* sin = in.sin + static_cast<size_t>(in.positions[token]) * d;
    for (int h = 0; h < in.heads; h++) {
      if (in.query_norm != nullptr) rms_norm_row(query + h * d, in.query_norm, in.eps, d, query + h * d);
      rotate_head(query + h * d, cos, sin, d);
    }
    const int slot = in.slots[token], place = slot % TILE;
    for (int h = 0; h < cache.kv_heads; h++) {
      if (in.key_norm != nullptr) rms_norm_row(key + h * d, in.key_norm, in.eps, d, key + h * d);
      rotate_head(key + h * d, cos, sin, d);
      const size_t offset = (static_cast<size_t>(slot / TILE) * cache.kv_heads + h) * tile_bytes;
      store_key(static_cast<char*>(cache.keys) + offset, place, key + h * d, d, cache.bf16);
      store_value(static_cast<char*>(cache.values) + offset, place, value + h * d, d, cache.bf16);
    }
  }
}

}  // namespace ISA
}  // namespace llm
