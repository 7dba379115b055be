#include "plan.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <new>

namespace llm {
namespace {

constexpr int FEW_ROWS = 2;       // so few are normed by every thread for itself: cheaper than a barrier
constexpr int ROW_BLOCK = 256;    // rows of a prompt that meet a range of panels at once
constexpr int ROWS_AT_ONCE = 4;   // that are normed, or written to the cache, by one thread
constexpr int STAGES_PER_LAYER = 16;
constexpr int RANGE_PANELS = SUMMARY_COLUMNS / PANEL;
constexpr int HEAD_STRIDE = SUMMARY_COLUMNS + 16;  // of a range's rows: an odd number of cache lines, see linear.cpp

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

int divided_up(int n, int by) { return (n + by - 1) / by; }

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

Memory::~Memory() { std::free(data_); }

void* Memory::at_least(size_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    size_ = 0;
    data_ = std::aligned_alloc(64, aligned(bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = bytes;
  }
  return data_;
}

// One thread on its way through the stages, of which all threads see the same ones.
class Plan::Worker {
 public:
  Worker(Plan& plan, int thread) : plan_(plan), thread_(thread), began_(plan.is_profiled ? now_ns() : 0) {}

  void run_layer(float* hidden, const LayerWeights& layer, const Cache& cache, const Followed& followed) {
    const ModelShape& shape = plan_.shape_;
    const int size = shape.hidden_size;
    const int query_size = shape.num_heads * shape.head_dim, kv_size = shape.num_kv_heads * shape.head_dim;
    auto* projected = static_cast<float*>(plan_.projected_.at_least(0));
    auto* attended = static_cast<float*>(plan_.attended_.at_least(0));
    auto* inner = static_cast<float*>(plan_.inner_.at_least(0));

    prepare(hidden, size, nullptr, plan_.step_.num_tokens, layer.input_norm, layer.qkv.format, size);
    multiply(layer.qkv, plan_.step_.num_tokens, projected, query_size + 2 * kv_size, Epilogue::store, QKV);
    write(layer, cache, projected, query_size, kv_size);
    const int rows = followed.num_tokens;
    float* const given = hidden;
    if (followed.tokens != nullptr) {
      auto* queries = static_cast<float*>(plan_.followed_.at_least(0));
      hidden = queries + static_cast<size_t>(rows) * query_size;
      move(followed, projected, query_size + 2 * kv_size, queries, query_size, query_size);
      move(followed, given, size, hidden, size, size);
      end_stage(WRITE);
      projected = queries;
    }
    const int query_stride = followed.tokens != nullptr ? query_size : query_size + 2 * kv_size;
    attend(followed, cache, projected, attended, query_stride, query_size);
    prepare(attended, query_size, nullptr, rows, nullptr, layer.out.format, query_size);
    multiply(layer.out, rows, hidden, size, Epilogue::add, OUT);
    prepare(hidden, size, nullptr, rows, layer.post_norm, layer.gate_up.format, size);
    multiply(layer.gate_up, rows, inner, shape.intermediate_size, Epilogue::silu_mul, GATE_UP);
    prepare(inner, shape.intermediate_size, nullptr, rows, nullptr, layer.down.format, shape.intermediate_size);
    multiply(layer.down, rows, hidden, size, Epilogue::add, DOWN);
    if (followed.tokens == nullptr) return;
    if (thread_ == 0)
      for (int i = 0; i < rows; i++)
        std::copy_n(hidden + static_cast<size_t>(i) * size, size, given + static_cast<size_t>(followed.tokens[i]) * size);
    end_stage(DOWN);
  }

  void run_head(const float* hidden, const int32_t* tokens, int count, const Head& out) {
    const Packed& head = plan_.head_;
    prepare(hidden, plan_.shape_.hidden_size, tokens, count, plan_.final_norm_, head.format, head.k);
    const int num_panels = divided_up(head.n, PANEL), ranges = num_ranges(head.n);
    float* const y = static_cast<float*>(plan_.unkept_.at_least(0)) + static_cast<size_t>(thread_) * count * HEAD_STRIDE;
    OwnedItems& items = next_items();
    for (int range; (range = items.take(thread_, ranges)) >= 0;) {
      const int begin = range * RANGE_PANELS, end = std::min(begin + RANGE_PANELS, num_panels);
      const int first = begin * PANEL, last = std::min(end * PANEL, head.n);
      Packed part = head;  // columns first .. last
      part.n = last - first;
      part.data += begin * packed_bytes(head.format, PANEL, head.k);
      if (head.bias != nullptr) part.bias += first;
      plan_.kernels_.linear.multiply(part, activations_, count, 0, end - begin, y, HEAD_STRIDE, Epilogue::store);
      for (int row = 0; row < count; row++) {
        const float* logits = y + static_cast<size_t>(row) * HEAD_STRIDE;
        float* maxima = nullptr;
        if (out.logits != nullptr) {
          std::copy_n(logits, part.n, out.logits + static_cast<size_t>(row) * head.n + first);
          maxima = out.maxima + static_cast<size_t>(row) * num_maxima(head.n) + num_maxima(first);
        }
        const float temperature = out.records != nullptr ? summed_temperature(out.records[row]) : 0;
        out.ranges[row * ranges + range] = plan_.kernels_.sampling.summarise(logits, first, last, temperature, maxima);
      }
    }
    end_stage(HEAD);
  }

 private:
  OwnedItems& next_items() { return plan_.items_[stage_++]; }

  void end_stage(Part part) {
    plan_.pool_.barrier();
    if (began_ == 0 || thread_ != 0) return;
    const int64_t now = now_ns();
    plan_.spent_ns[part] += now - began_;
    began_ = now;
  }

  // The rows of x that are followed, close together.
  void move(const Followed& followed, const float* x, size_t stride, float* to, size_t to_stride, int size) {
    OwnedItems& items = next_items();
    for (int i; (i = items.take(thread_, followed.num_tokens)) >= 0;)
      std::copy_n(x + followed.tokens[i] * stride, size, to + i * to_stride);
  }

  // Rows of x (all, or those of `tokens`), normed if there are weights, into what `format` multiplies with.
  void prepare(const float* x, int size, const int32_t* tokens, int rows, const float* norm, Format format, int k) {
    const size_t stride = plan_.kernels_.linear.activation_bytes(format, k);
    uint8_t* own = plan_.own_memory(thread_);
    auto* normed = reinterpret_cast<float*>(own);
    uint8_t* few = own + plan_.few_offset_;
    const bool is_few = rows <= FEW_ROWS;
    activations_ = is_few ? few : static_cast<uint8_t*>(plan_.activations_.at_least(0));
    const auto one = [&](int row) {
      const float* from = x + static_cast<size_t>(tokens == nullptr ? row : tokens[row]) * size;
      if (norm != nullptr) {
        plan_.kernels_.elementwise.rms_norm(from, norm, plan_.shape_.eps, size, normed);
        from = normed;
      }
      plan_.kernels_.linear.quantize(format, from, size, 1, k, activations_ + row * stride);
    };
    OwnedItems& items = next_items();
    if (is_few) {
      for (int row = 0; row < rows; row++) one(row);
      return;
    }
    const int num_groups = divided_up(rows, ROWS_AT_ONCE);
    for (int group; (group = items.take(thread_, num_groups)) >= 0;)
      for (int row = group * ROWS_AT_ONCE; row < std::min((group + 1) * ROWS_AT_ONCE, rows); row++) one(row);
    end_stage(NORM);
  }

  void multiply(const Packed& weight, int rows, float* y, int ldy, Epilogue epilogue, Part part) {
    const int num_panels = divided_up(weight.n, PANEL), num_blocks = divided_up(rows, ROW_BLOCK);
    const int items_each = rows == 1 ? 3 : 12;  // of a thread: the last ones leave a thread without work
    const int at_once = std::clamp(divided_up(num_panels * num_blocks, items_each * plan_.pool_.size()), 1, 16);
    const int num_groups = divided_up(num_panels, at_once);
    const size_t stride = plan_.kernels_.linear.activation_bytes(weight.format, weight.k);
    OwnedItems& items = next_items();
    for (int item; (item = items.take(thread_, num_groups * num_blocks)) >= 0;) {
      const int row = item / num_groups * ROW_BLOCK, panel = item % num_groups * at_once;
      plan_.kernels_.linear.multiply(weight, activations_ + row * stride, std::min(ROW_BLOCK, rows - row), panel,
                                     std::min(panel + at_once, num_panels), y + static_cast<size_t>(row) * ldy,
                                     ldy, epilogue);
    }
    end_stage(part);
  }

  void write(const LayerWeights& layer, const Cache& cache, float* projected, int query_size, int kv_size) {
    const ModelShape& shape = plan_.shape_;
    const Projected in{projected,
                       projected + query_size,
                       projected + query_size + kv_size,
                       static_cast<size_t>(query_size + 2 * kv_size),
                       shape.num_heads,
                       layer.query_norm,
                       layer.key_norm,
                       shape.eps,
                       plan_.cos_,
                       plan_.sin_,
                       plan_.step_.positions,
                       plan_.step_.slots};
    const int rows = plan_.step_.num_tokens;
    OwnedItems& items = next_items();
    const int num_groups = divided_up(rows, ROWS_AT_ONCE);
    for (int group; (group = items.take(thread_, num_groups)) >= 0;)
      plan_.kernels_.attention.write(cache, in, group * ROWS_AT_ONCE, std::min((group + 1) * ROWS_AT_ONCE, rows));
    end_stage(WRITE);
  }

  void attend(const Followed& followed, const Cache& cache, const float* query, float* out, int query_stride, int out_stride) {
    const auto& kernels = plan_.kernels_.attention;
    const Attended io{query,
                      static_cast<size_t>(query_stride),
                      out,
                      static_cast<size_t>(out_stride),
                      plan_.shape_.num_heads,
                      1.0f / std::sqrt(static_cast<float>(cache.head_dim))};
    uint8_t* scratch = plan_.own_memory(thread_) + plan_.scratch_offset_;
    auto* partials = static_cast<float*>(plan_.partials_.at_least(0));
    const auto& tiles = followed.attention.tiles();
    const auto& splits = followed.attention.splits();
    OwnedItems& items = next_items();
    const int count = static_cast<int>(tiles.size()) * cache.kv_heads;
    const int owner = plan_.pool_.size() - 1 - thread_;  // tiles begin with a row's last tokens
    const auto item = [&](int i) { return AttentionItem{&tiles[i / cache.kv_heads], i % cache.kv_heads}; };
    for (int i = items.take(owner, count), next; i >= 0; i = next) {
      next = items.take(owner, count);
      kernels.attend(cache, followed.rows, io, item(i), item(next >= 0 ? next : i), scratch, partials);
    }
    end_stage(ATTEND);
    if (splits.empty()) return;
    OwnedItems& combined = next_items();
    const int num_combined = static_cast<int>(splits.size()) * cache.kv_heads;
    for (int i; (i = combined.take(owner, num_combined)) >= 0;)
      kernels.combine(cache, io, tiles.data(), splits[i / cache.kv_heads], i % cache.kv_heads, partials);
    end_stage(ATTEND);
  }

 private:
  Plan& plan_;
  const int thread_;
  int64_t began_;
  size_t stage_ = 0;
  uint8_t* activations_ = nullptr;
};

Plan::Plan(const Kernels& kernels, Pool& pool, const ModelShape& shape, const float* cos, const float* sin)
    : kernels_(kernels), pool_(pool), shape_(shape), cos_(cos), sin_(sin) {
  const int widest = std::max({shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size});
  for (int format = 0; format <= static_cast<int>(Format::q4_1); format++)
    activation_bytes_ =
        std::max(activation_bytes_, kernels.linear.activation_bytes(static_cast<Format>(format), widest));
  const Cache cache{nullptr, nullptr, shape.block_size, shape.num_kv_heads, shape.head_dim, shape.kv_format};
  few_offset_ = aligned(static_cast<size_t>(widest) * sizeof(float));
  scratch_offset_ = few_offset_ + FEW_ROWS * activation_bytes_;
  own_bytes_ = aligned(scratch_offset_ + kernels.attention.scratch_bytes(cache, shape.num_heads));
  own_.at_least(pool.size() * own_bytes_);
}

void Plan::begin(const StepTokens& step) {
  step_ = step;
  const size_t rows = step.num_tokens;
  const int query_size = shape_.num_heads * shape_.head_dim, kv_size = shape_.num_kv_heads * shape_.head_dim;
  all_.num_tokens = step.num_tokens;
  all_.tokens = nullptr;
  all_.rows = step.rows;
  all_.attention.make(step.rows, shape_.num_heads, shape_.num_kv_heads, shape_.head_dim, pool_.size());
  partials_.at_least(all_.attention.num_partial_floats() * 4);
  find_lasting();
  projected_.at_least(rows * (query_size + 2 * kv_size) * 4);
  attended_.at_least(rows * query_size * 4);
  inner_.at_least(rows * shape_.intermediate_size * 4);
  activations_.at_least(rows * activation_bytes_);
}

// Rows of the tokens that last, one token each: a token sees what lies before it and nothing else of its row.
void Plan::find_lasting() {
  end_.tokens = nullptr;
  if (step_.lasting == nullptr || step_.num_lasting == step_.num_tokens) return;
  const Rows& rows = step_.rows;
  const int count = step_.num_lasting, width = rows.table_width;
  end_starts_.resize(count + 1);
  end_contexts_.resize(count);
  end_tables_.resize(static_cast<size_t>(count) * width);
  for (int i = 0, row = 0; i < count; i++) {
    const int token = step_.lasting[i];
    while (rows.query_starts[row + 1] <= token) row++;
    end_starts_[i] = i;
    end_contexts_[i] = rows.context_lens[row] - (rows.query_starts[row + 1] - 1 - token);
    std::copy_n(rows.block_tables + static_cast<size_t>(row) * width, width,
                end_tables_.begin() + static_cast<size_t>(i) * width);
  }
  end_starts_[count] = count;
  end_.num_tokens = count;
  end_.tokens = step_.lasting;
  end_.rows = {count, end_starts_.data(), end_contexts_.data(), end_tables_.data(), width};
  end_.attention.make(end_.rows, shape_.num_heads, shape_.num_kv_heads, shape_.head_dim, pool_.size());
  partials_.at_least(end_.attention.num_partial_floats() * 4);
  followed_.at_least(static_cast<size_t>(count) * (shape_.num_heads * shape_.head_dim + shape_.hidden_size) * 4);
}

void Plan::run_layers(float* hidden, int start, int stop) {
  const size_t stages = static_cast<size_t>(stop - start) * STAGES_PER_LAYER;
  while (items_.size() < stages) items_.emplace_back(pool_.size());
  for (size_t i = 0; i < stages; i++) items_[i].reset();
  pool_.run([&](int thread) {
    Worker worker(*this, thread);
    for (int i = start; i < stop; i++) {
      const Cache cache{caches_[i].first,     caches_[i].second, shape_.block_size,
                        shape_.num_kv_heads, shape_.head_dim,   shape_.kv_format};
      worker.run_layer(hidden, layers_[i], cache, is_last(i) ? end_ : all_);
    }
  });
}

void Plan::run_head(const float* hidden, const int32_t* tokens, int count, const Head& head) {
  activations_.at_least(static_cast<size_t>(count) * activation_bytes_);
  unkept_.at_least(sizeof(float) * pool_.size() * count * HEAD_STRIDE);
  while (items_.size() < STAGES_PER_LAYER) items_.emplace_back(pool_.size());
  for (int i = 0; i < STAGES_PER_LAYER; i++) items_[i].reset();
  pool_.run([&](int thread) { Worker(*this, thread).run_head(hidden, tokens, count, head); });
}

}  // namespace llm
