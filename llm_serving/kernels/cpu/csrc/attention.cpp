// Paged attention: scores, online softmax and weighted sum, CHUNK positions at a time.
//
// Order of arithmetic of one query and head, whoever shares its tile: the positions of a piece in chunks
// of 64 from the piece's first position; a score adds up over the head's dimensions in order (two at a time
// in bfloat16); the weights' sum runs in 16 lanes; an accumulator adds up over positions in order (two at a
// time in bfloat16) and is rescaled when a chunk begins.  Pieces are then folded in order.  What lies beyond
// a query is masked, so it adds an exact zero; what lies beyond all queries of a group is never read into a
// result.  With a bfloat16 cache, queries (times scale and log2(e)) and weights are rounded to bfloat16; with
// int8, to words whose products add up exactly in a score and in a chunk's share of an accumulator.
#include <algorithm>
#include <cmath>

#include "attention_chunk.hpp"

namespace llm {
namespace ISA {
namespace {

constexpr int AHEAD = 2;  // chunks that are fetched before they are needed

// Queries of one kv head, scaled: [tokens * group, steps].
template <KvFormat format>
void pack_queries(const Attended& io, const AttentionTile& tile, int kv_head, int group, int d, uint32_t* packed,
                  float* scales) {
  const F32 scale = set1(io.scale * LOG2_E);
  float rounded[LANES];
  for (int row = 0; row < tile.num_tokens * group; row++) {
    const int token = tile.first_token + row / group, head = kv_head * group + row % group;
    const float* query = io.query + static_cast<size_t>(token) * io.query_stride + static_cast<size_t>(head) * d;
    char* to = reinterpret_cast<char*>(packed) + static_cast<size_t>(row) * d * (format == KvFormat::f32 ? 4 : 2);
    F32 by = zero();
    if constexpr (format == KvFormat::i8) {
      scales[row] = unit_of(query, scale, d, MOST_QUERY_WORD);
      by = set1(scales[row] > 0 ? 1.0f / scales[row] : 0.0f);
    }
    for (int i = 0; i < d; i += LANES) {
      const int count = std::min(d - i, LANES);
      const F32 scaled = mul(load(query + i, count), scale);
      if constexpr (format == KvFormat::i8) {
        pack_i16(reinterpret_cast<int16_t*>(rounded), to_int(mul(scaled, by)));
        std::memcpy(to + i * 2, rounded, static_cast<size_t>(count) * 2);
      } else if constexpr (format == KvFormat::bf16) {
        round_bf16(reinterpret_cast<uint16_t*>(rounded), scaled);
        std::memcpy(to + i * 2, rounded, static_cast<size_t>(count) * 2);
      } else {
        store(reinterpret_cast<float*>(to) + i, scaled, count);
      }
    }
  }
}

// Chunk `number` of a row's context of `end` positions; beyond it, its last tile.
Chunk find_chunk(const Cache& cache, const int32_t* blocks, int kv_head, int number, int end) {
  const size_t bytes = tile_bytes(cache.format, cache.head_dim);
  Chunk chunk;
  for (int t = 0; t < CHUNK_TILES; t++) {
    const int position = std::min(number * CHUNK + t * TILE, (end - 1) / TILE * TILE);
    const size_t slot = static_cast<size_t>(blocks[position / cache.block_size]) * cache.block_size +
                        position % cache.block_size;
    const size_t offset = (slot / TILE * cache.kv_heads + kv_head) * bytes;
    chunk.keys[t] = static_cast<const char*>(cache.keys) + offset;
    chunk.values[t] = static_cast<const char*>(cache.values) + offset;
  }
  return chunk;
}

// The chunks that a thread reads: those of an item, then those of the next.
class Walk {
 public:
  Walk(const Cache& cache, const Rows& rows, const AttentionItem& item, const AttentionItem& next)
      : cache_(cache), rows_(rows), item_(item), next_(next) {
    const AttentionTile& tile = *item.tile;
    end_ = (std::min(tile.piece_end * PIECE, tile.first_position + tile.num_tokens) + CHUNK - 1) / CHUNK;
  }

  Chunk chunk(int number) const {
    if (number < end_) return of(item_, number);
    return of(next_, next_.tile->piece_begin * (PIECE / CHUNK) + number - end_);
  }

 private:
  Chunk of(const AttentionItem& item, int number) const {
    const int32_t* blocks = rows_.block_tables + static_cast<size_t>(item.tile->row) * rows_.table_width;
    return find_chunk(cache_, blocks, item.kv_head, number, item.tile->first_position + item.tile->num_tokens);
  }

  const Cache& cache_;
  const Rows& rows_;
  const AttentionItem &item_, &next_;
  int end_;
};

// One piece of a tile's context into `part`.
template <KvFormat format>
void attend_piece(const Walk& walk, const AttentionTile& tile, int group, int d, int piece, const Scratch& scratch,
                  const Partial& part) {
  const int rows = tile.num_tokens * group;
  std::fill(part.acc, part.acc + static_cast<size_t>(rows) * padded(d), 0.0f);
  std::fill(part.max, part.max + rows, -INFINITE);
  std::fill(scratch.lanes, scratch.lanes + rows * LANES, 0.0f);
  const int end = std::min((piece + 1) * PIECE, tile.first_position + tile.num_tokens);
  const int num_groups = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int number = piece * (PIECE / CHUNK); number * CHUNK < end; number++) {
    const Chunk chunk = walk.chunk(number), later = walk.chunk(number + AHEAD);
    for (int g = 0; g < num_groups; g++) {
      const int first = rows * g / num_groups, last = rows * (g + 1) / num_groups;
      int visible[MOST_ROWS] = {};
      for (int m = first; m < last; m++) visible[m - first] = tile.first_position + m / group + 1 - number * CHUNK;
      if (visible[last - first - 1] <= 0) continue;
      if (g == num_groups - 1)
        attend_rows<format, true>(last - first, chunk, later, d, visible, first, scratch, part);
      else
        attend_rows<format, false>(last - first, chunk, later, d, visible, first, scratch, part);
    }
  }
  for (int m = 0; m < rows; m++) part.sum[m] = sum(load(scratch.lanes + m * LANES));
}

// `into` becomes what it and the piece after it are together.
void fold(const Partial& into, const Partial& piece, int rows, int d) {
  for (int m = 0; m < rows; m++) {
    if (piece.max[m] == -INFINITE) continue;  // it sees nothing of the piece
    const float max = std::max(piece.max[m], into.max[m]);
    const float before = into.max[m] == max ? 1.0f : exp2(into.max[m] - max);
    const float now = piece.max[m] == max ? 1.0f : exp2(piece.max[m] - max);
    float* a = into.acc + static_cast<size_t>(m) * padded(d);
    const float* b = piece.acc + static_cast<size_t>(m) * padded(d);
    for (int i = 0; i < d; i += LANES) store(a + i, fma(load(b + i), set1(now), mul(load(a + i), set1(before))));
    into.max[m] = max;
    into.sum[m] = std::fma(piece.sum[m], now, into.sum[m] * before);
  }
}

void write_out(const Attended& io, const AttentionTile& tile, int kv_head, int group, int d, const Partial& part) {
  for (int row = 0; row < tile.num_tokens * group; row++) {
    const int token = tile.first_token + row / group, head = kv_head * group + row % group;
    float* out = io.out + static_cast<size_t>(token) * io.out_stride + static_cast<size_t>(head) * d;
    const float* acc = part.acc + static_cast<size_t>(row) * padded(d);
    const F32 by = set1(1.0f / part.sum[row]);
    for (int i = 0; i < d; i += LANES)  // plus zero: a zero's sign depends on what was masked
      store(out + i, add(mul(load(acc + i), by), zero()), std::min(d - i, LANES));
  }
}

template <KvFormat format>
void attend_item(const Cache& cache, const Rows& rows, const Attended& io, const AttentionItem& item,
                 const AttentionItem& next, void* memory, float* partials) {
  const AttentionTile& tile = *item.tile;
  const int d = cache.head_dim, group = io.heads / cache.kv_heads, num_rows = tile.num_tokens * group;
  Scratch scratch;
  lay_out(scratch, memory, group * tile_tokens(group), d);
  pack_queries<format>(io, tile, item.kv_head, group, d, scratch.query, scratch.query_scale);
  float* place = scratch.own;
  if (tile.partial >= 0) place = partials + tile.partial + item.kv_head * partial_floats(num_rows, d);
  const Partial own = partial_at(place, num_rows, d), other = partial_at(scratch.other, num_rows, d);
  const Walk walk(cache, rows, item, next);
  for (int piece = tile.piece_begin; piece < tile.piece_end; piece++) {
    const bool is_first = piece == tile.piece_begin;
    attend_piece<format>(walk, tile, group, d, piece, scratch, is_first ? own : other);
    if (!is_first) fold(own, other, num_rows, d);
  }
  if (tile.partial < 0) write_out(io, tile, item.kv_head, group, d, own);
}

void attend(const Cache& cache, const Rows& rows, const Attended& io, const AttentionItem& item,
            const AttentionItem& next, void* scratch, float* partials) {
  switch (cache.format) {
    case KvFormat::f32: return attend_item<KvFormat::f32>(cache, rows, io, item, next, scratch, partials);
    case KvFormat::bf16: return attend_item<KvFormat::bf16>(cache, rows, io, item, next, scratch, partials);
    case KvFormat::i8: return attend_item<KvFormat::i8>(cache, rows, io, item, next, scratch, partials);
  }
}

void combine(const Cache& cache, const Attended& io, const AttentionTile* tiles, AttentionSplit split, int kv_head,
             float* partials) {
  const int d = cache.head_dim, group = io.heads / cache.kv_heads;
  const AttentionTile& first = tiles[split.tile_begin];
  const int rows = first.num_tokens * group;
  const auto result = [&](int tile) {
    return partial_at(partials + tiles[tile].partial + kv_head * partial_floats(rows, d), rows, d);
  };
  for (int tile = split.tile_begin + 1; tile < split.tile_end; tile++)
    fold(result(split.tile_begin), result(tile), rows, d);
  write_out(io, first, kv_head, group, d, result(split.tile_begin));
}

}  // namespace

void write(const Cache&, const Projected&, int begin, int end);  // cache_write.cpp

AttentionKernels attention_kernels() { return {write, scratch_bytes, attend, combine}; }

}  // namespace ISA
}  // namespace llm
