#include "attention_plan.hpp"

#include <algorithm>

namespace llm {
namespace {

constexpr int64_t LEAST_SPLIT = 2 * PIECE;  // a context that is not longer is never split
constexpr int ITEMS_PER_THREAD = 4;         // so many at least, if splitting can give them

int num_pieces(int num_visible) { return (num_visible + PIECE - 1) / PIECE; }

// Tiles of at most `most` tokens: as few as can be, or some more if only these can be shared evenly.
int num_tiles(int count, int most, int kv_heads, int num_threads) {
  const int least = (count + most - 1) / most;
  for (int tiles = least; least > 1 && tiles < 2 * least; tiles++)
    if (tiles * kv_heads % num_threads == 0) return tiles;
  return least;
}

}  // namespace

void AttentionPlan::make(const Rows& rows, int heads, int kv_heads, int head_dim, int num_threads) {
  tiles_.clear();
  splits_.clear();
  partial_floats_ = 0;
  const int group = heads / kv_heads, most = tile_tokens(group);
  int64_t total = 0;  // positions that tiles read
  for (int row = 0; row < rows.num_rows; row++) {
    const int count = rows.query_starts[row + 1] - rows.query_starts[row];
    total += static_cast<int64_t>(rows.context_lens[row]) * num_tiles(count, most, kv_heads, num_threads);
  }
  const int64_t share = total * kv_heads / (num_threads * ITEMS_PER_THREAD);

  for (int row = 0; row < rows.num_rows; row++) {
    const int begin = rows.query_starts[row], length = rows.query_starts[row + 1] - begin;
    const int context = rows.context_lens[row], before = context - length;
    const int tiles = num_tiles(length, most, kv_heads, num_threads);
    const bool is_split = num_threads > 1 && tiles == 1 && context > std::max(LEAST_SPLIT, share);
    for (int tile = tiles - 1; tile >= 0; tile--) {
      const int start = length * tile / tiles, first = begin + start;
      const int count = length * (tile + 1) / tiles - start;
      const int position = before + start, pieces = num_pieces(position + count);
      if (!is_split) {
        tiles_.push_back({row, first, count, position, 0, pieces, -1});
        continue;
      }
      const int tile_begin = static_cast<int>(tiles_.size());
      for (int piece = 0; piece < pieces; piece++) {
        const auto place = static_cast<int64_t>(partial_floats_);
        tiles_.push_back({row, first, count, position, piece, piece + 1, place});
        partial_floats_ += partial_floats(count * group, head_dim) * kv_heads;
      }
      splits_.push_back({tile_begin, static_cast<int>(tiles_.size())});
    }
  }
}

}  // namespace llm
