// Who attends to what in a step: made once, used by every layer.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace llm {

// Tokens of a row that are attended together: so many that a key, once read, meets up to 96 queries.
constexpr int tile_tokens(int queries_per_kv_head) {
  return queries_per_kv_head < 96 ? 96 / queries_per_kv_head : 1;
}

// Work items are tiles x kv heads: item i is tile i / kv_heads, kv head i % kv_heads; the last
// tokens of a row come first, as they cost most.  The tiles of a row are of one size; a single one with a
// long context is split by pieces where that keeps the threads busy.  No division changes a bit of the
// result.  Keeps its memory from step to step.
class AttentionPlan {
 public:
  void make(const Rows&, int heads, int kv_heads, int head_dim, int num_threads);

  const std::vector<AttentionTile>& tiles() const { return tiles_; }
  const std::vector<AttentionSplit>& splits() const { return splits_; }
  size_t num_partial_floats() const { return partial_floats_; }

 private:
  std::vector<AttentionTile> tiles_;
  std::vector<AttentionSplit> splits_;
  size_t partial_floats_ = 0;
};

}  // namespace llm
