#include "attention_plan.hpp"

#include <algorithm>

namespace llm {
namespace {

constexpr int64_t LEAST_SPLIT = 2 * PIECE;  // a context that is not longer is never split
constexpr int ITEMS_PER_THREAD = 4;         // so many at least, if splitting can give them

int num_pieces(int num_visible) { return (num_visible + PIECE - 1) / PIECE; }

}  // namespace

void AttentionPlan::make(const Rows& rows, int heads, int kv_heads, int head_dim, int num_threads) {
  tiles_.clear();
  splits_.clear();
  partial_floats_ = 0;
  const int group = heads / kv_heads, most = tile_tokens(group);
  int64_t total = 0;  // positions that tiles read
  for (int row = 0; row < rows.num_rows; row++) {
    const int count = rows.query_starts[row + 1] - rows.query_starts[row];
    total += static_cast<int64_t>(rows.context_lens[row]) * ((count + most - 1) / most);
  }
  const int64_t share = total * kv_heads / (num_threads * ITEMS_PER_THREAD);

  for (int row = 0; row < rows.num_rows; row++) {
    const int begin = rows.query_starts[row], end = rows.query_starts[row + 1];
    const int context = rows.context_lens[row], before = context - (end - begin);
    const bool is_split = num_threads > 1 && context > std::max(LEAST_SPLIT, share);
    for (int tile = (end - begin + most - 1) / most - 1; tile >= 0; tile--) {
      const int first = begin + tile * most, count = std::min(most, end - first);
      const int position = before + tile * most, pieces = num_pieces(position + count);
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
