// All layers of a LLaMA in one native call: what an operation a layer and a call from Python would cost
// is spent once a step.
//
// One Pool::run carries out every layer; stages are separated by barriers, and within one the threads take
// items until none is left.  No result depends on who took what.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "attention_plan.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace llm {

struct ModelShape {
  int hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size;
  float eps;
  int block_size;
  KvFormat kv_format;
};

// Norms are float32; `gate_up` has gates and up-projections interleaved by half panels.
struct LayerWeights {
  const float* input_norm;
  Packed qkv, out;
  const float* post_norm;
  Packed gate_up, down;
  const float* query_norm;  // [head_dim], or null
  const float* key_norm;
};

// The tokens of a step, see step_arrays.StepInputs; all must outlive it.
struct StepTokens {
  int num_tokens;
  const int32_t* positions;  // [num_tokens]
  const int32_t* slots;      // [num_tokens]
  Rows rows;
  const int32_t* lasting;  // [num_lasting] the tokens that somebody wants of the model's end, rising; null: all
  int num_lasting;
};

// Grows, never shrinks; aligned to 64 bytes, not cleared.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* at_least(size_t bytes);

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Nanoseconds of the calling thread in each stage, waiting at its end included.
enum Part { NORM, QKV, WRITE, ATTEND, OUT, GATE_UP, DOWN, HEAD, NUM_PARTS };

class Plan {
 public:
  // cos, sin: [max_model_len, head_dim], see models.rope.
  Plan(const Kernels&, Pool&, const ModelShape&, const float* cos, const float* sin);

  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void add_layer(const LayerWeights& weights) { layers_.push_back(weights); }
  void set_head(const float* norm, const Packed& weight) { final_norm_ = norm, head_ = weight; }
  // Keys and values of each layer; see Cache.
  void set_cache(std::vector<std::pair<void*, void*>> layers) { caches_ = std::move(layers); }

  const ModelShape& shape() const { return shape_; }
  int num_layers() const { return static_cast<int>(layers_.size()); }
  int num_tokens() const { return step_.num_tokens; }
  int vocab_size() const { return head_.n; }

  // The step that `run_layers` works on from now.
  void begin(const StepTokens& step);
  // hidden [num_tokens, hidden_size] through layers [start, stop), in place.  In the model's last layer only
  // keys and values of all tokens are needed: what it leaves of tokens that are not lasting means nothing.
  void run_layers(float* hidden, int start, int stop);
  // Rows `tokens` [count] of hidden through the last norm and the head: of each what its ranges amount to
  // [count, num_ranges(vocab_size)], at the summed_temperature of `records` [count] unless null; and if anybody wants
  // them, not null, logits [count, vocab_size] and their maxima [count, num_maxima(vocab_size)].
  struct Head {
    Summary* ranges;
    const SamplingRecord* records;
    float *logits, *maxima;
  };
  void run_head(const float* hidden, const int32_t* tokens, int count, const Head& head);

  bool is_profiled = false;
  int64_t spent_ns[NUM_PARTS] = {};

 private:
  class Worker;

  // The memory of one thread: a normed row, activations of few rows, scratch of the attention.
  uint8_t* own_memory(int thread) { return static_cast<uint8_t*>(own_.at_least(0)) + thread * own_bytes_; }

  const Kernels& kernels_;
  Pool& pool_;
  ModelShape shape_;
  const float *cos_, *sin_;
  std::vector<LayerWeights> layers_;
  std::vector<std::pair<void*, void*>> caches_;
  const float* final_norm_ = nullptr;
  Packed head_{};

  size_t activation_bytes_ = 0;  // of the widest row in any format
  size_t few_offset_, scratch_offset_, own_bytes_;

  // Whose queries a layer follows: all tokens, or those that last, close together.
  struct Followed {
    int num_tokens;
    const int32_t* tokens;  // of the step; null: all
    Rows rows;
    AttentionPlan attention;
  };

  bool is_last(int layer) const { return layer + 1 == num_layers() && end_.tokens != nullptr; }
  void find_lasting();

  StepTokens step_{};
  Followed all_, end_;
  std::vector<int32_t> end_starts_, end_contexts_, end_tables_;
  std::deque<OwnedItems> items_;  // one for each stage of a run
  Memory projected_, attended_, inner_, activations_, own_, partials_, unkept_, followed_;
};

}  // namespace llm
