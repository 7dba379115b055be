// New tokens into the cache: norm per head, rotation, and the tiles' layout (see kernels.hpp).
#include <algorithm>
#include <cmath>

#include "elementwise.hpp"
#include "kernels.hpp"
#include "unit.hpp"

namespace llm {
namespace ISA {
namespace {

// Plain stores of a token's own bytes: the other half of a pair may be written by another thread.
template <class T>
void store_key_pairs(char* tile, int place, const T* pairs, int count) {
  for (int j = 0; j < count; j += 2) std::memcpy(tile + (j * TILE + place * 2) * sizeof(T), pairs + j, 2 * sizeof(T));
}

template <class T>
void store_value_halves(char* tile, int place, const T* values, int d) {
  T* to = reinterpret_cast<T*>(tile) + static_cast<size_t>(place / 2) * d * 2 + place % 2;
  for (int j = 0; j < d; j++) to[j * 2] = values[j];
}

void round_row(uint16_t* rounded, const float* x, int d) {
  for (int i = 0; i < d; i += LANES) round_bf16(rounded + i, load(x + i, std::min(d - i, LANES)));
}

constexpr float MOST_BYTE = 127.0f;

void round_row(int8_t* bytes, const float* x, float scale, int d) {
  const F32 by = set1(scale > 0 ? 1.0f / scale : 0.0f);
  for (int i = 0; i < d; i += LANES) pack_i8(bytes + i, to_int(mul(load(x + i, std::min(d - i, LANES)), by)));
}

struct Place {
  char *keys, *values;  // of a tile and head
  int offset;           // within the tile
};

void store_floats(const Place& at, const float* key, const float* value, int d) {
  for (int i = 0; i < d; i++) std::memcpy(at.keys + (i * TILE + at.offset) * 4, key + i, 4);
  std::memcpy(at.values + static_cast<size_t>(at.offset) * d * 4, value, static_cast<size_t>(d) * 4);
}

void store_bf16(const Place& at, const float* key, const float* value, int d) {
  uint16_t rounded[MAX_HEAD_DIM + LANES];
  round_row(rounded, key, d);
  store_key_pairs(at.keys, at.offset, rounded, d);
  round_row(rounded, value, d);
  store_value_halves(at.values, at.offset, rounded, d);
}

// Bytes cannot be NaN: a key's scale is if the key or the value is not finite, so that all who see it get NaN.
void store_bytes(const Place& at, const float* key, const float* value, int d) {
  int8_t bytes[MAX_HEAD_DIM + LANES];
  float key_scale = unit_of(key, set1(1.0f), d, MOST_BYTE), value_scale = unit_of(value, set1(1.0f), d, MOST_BYTE);
  key_scale += value_scale * 0.0f;
  if (!std::isfinite(value_scale)) value_scale = 0.0f;
  round_row(bytes, key, key_scale, d);
  store_key_pairs(at.keys, at.offset, bytes, d);
  round_row(bytes, value, value_scale, d);
  store_value_halves(at.values, at.offset, bytes, d);
  std::memcpy(at.keys + scales_offset(d) + at.offset * 4, &key_scale, 4);
  std::memcpy(at.values + scales_offset(d) + at.offset * 4, &value_scale, 4);
}

// The lines that a token's keys and values go to: they are in memory, and each is another one.
void fetch_lines(const Cache& cache, int slot) {
  const size_t bytes = tile_bytes(cache.format, cache.head_dim);
  const size_t offset = static_cast<size_t>(slot / TILE) * cache.kv_heads * bytes;
  const char* keys = static_cast<const char*>(cache.keys) + offset;
  for (size_t i = 0; i < cache.kv_heads * bytes; i += 64) __builtin_prefetch(keys + i, 1);
  const int together = cache.format == KvFormat::f32 ? 1 : 2;
  const size_t row_bytes = bytes / TILE * together;
  const size_t row = slot % TILE / together * row_bytes;
  for (int h = 0; h < cache.kv_heads; h++)
    for (size_t i = 0; i < row_bytes; i += 64)
      __builtin_prefetch(static_cast<const char*>(cache.values) + offset + h * bytes + row + i, 1);
}

}  // namespace

void write(const Cache& cache, const Projected& in, int begin, int end) {
  const int d = cache.head_dim;
  const size_t bytes = tile_bytes(cache.format, d);
  fetch_lines(cache, in.slots[begin]);
  for (int token = begin; token < end; token++) {
    if (token + 1 < end && in.slots[token + 1] / TILE != in.slots[token] / TILE)
      fetch_lines(cache, in.slots[token + 1]);
    float* query = in.query + token * in.stride;
    float* key = in.key + token * in.stride;
    const float* value = in.value + token * in.stride;
    const float* cos = in.cos + static_cast<size_t>(in.positions[token]) * d;
    const float* sin = in.sin + static_cast<size_t>(in.positions[token]) * d;
    for (int h = 0; h < in.heads; h++) {
      if (in.query_norm != nullptr) rms_norm_row(query + h * d, in.query_norm, in.eps, d, query + h * d);
      rotate_head(query + h * d, cos, sin, d);
    }
    const int slot = in.slots[token];
    for (int h = 0; h < cache.kv_heads; h++) {
      if (in.key_norm != nullptr) rms_norm_row(key + h * d, in.key_norm, in.eps, d, key + h * d);
      rotate_head(key + h * d, cos, sin, d);
      const size_t offset = (static_cast<size_t>(slot / TILE) * cache.kv_heads + h) * bytes;
      const Place at = {static_cast<char*>(cache.keys) + offset, static_cast<char*>(cache.values) + offset,
                        slot % TILE};
      switch (cache.format) {
        case KvFormat::f32: store_floats(at, key + h * d, value + h * d, d); break;
        case KvFormat::bf16: store_bf16(at, key + h * d, value + h * d, d); break;
        case KvFormat::i8: store_bytes(at, key + h * d, value + h * d, d); break;
      }
    }
  }
}

}  // namespace ISA
}  // namespace llm
