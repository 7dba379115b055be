// Attention for Python, operation by operation: writing to a layer's cache, and a step's attention planned once.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>

#include "attention_plan.hpp"
#include "bind.hpp"
#include "bind_arrays.hpp"

namespace nb = nanobind;

namespace llm {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that only grows.
struct Memory {
  char* at_least(size_t num_bytes) {
    if (num_bytes > size) {
      data.reset(static_cast<char*>(std::aligned_alloc(64, (num_bytes + 63) / 64 * 64)));
      if (!data) throw std::bad_alloc();
      size = num_bytes;
    }
    return data.get();
  }

  std::unique_ptr<char, Free> data;
  size_t size = 0;
};

// keys and values [tiles, kv_heads, 16 * head_dim] or, of int8, [.., tile_bytes], laid out as kernels.hpp says.
Cache cache_of(const Array& keys, const Array& values, int block_size, int64_t head_dim) {
  require(block_size > 0 && block_size % TILE == 0, "block_size must be a multiple of 16");
  require(head_dim > 0 && head_dim % 2 == 0 && head_dim <= MAX_HEAD_DIM, "head_dim must be even and at most 1024");
  require(keys.ndim() == 3, "keys must be [tiles, kv_heads, numbers of a tile]");
  const auto tiles = static_cast<int64_t>(keys.shape(0)), heads = static_cast<int64_t>(keys.shape(1));
  require(heads > 0 && tiles * TILE % block_size == 0, "keys must hold whole blocks of at least one head");
  const KvFormat format = keys.dtype() == nb::dtype<uint16_t>() ? KvFormat::bf16
                          : keys.dtype() == nb::dtype<int8_t>() ? KvFormat::i8
                                                                : KvFormat::f32;
  Cache cache = {nullptr, nullptr, block_size, static_cast<int>(heads), static_cast<int>(head_dim), format};
  if (format == KvFormat::i8) {
    const auto bytes = static_cast<int64_t>(tile_bytes(format, cache.head_dim));
    cache.keys = data_of<int8_t>(keys, "keys", {tiles, heads, bytes});
    cache.values = data_of<int8_t>(values, "values", {tiles, heads, bytes});
  } else if (format == KvFormat::bf16) {
    cache.keys = data_of<uint16_t>(keys, "keys", {tiles, heads, TILE * head_dim});
    cache.values = data_of<uint16_t>(values, "values", {tiles, heads, TILE * head_dim});
  } else {
    cache.keys = data_of<float>(keys, "keys", {tiles, heads, TILE * head_dim});
    cache.values = data_of<float>(values, "values", {tiles, heads, TILE * head_dim});
  }
  return cache;
}

void write_cache(const Kernels& kernels, Pool& pool, const Array& keys, const Array& values, int block_size,
                 const Array& projected, int heads, const Input& cos, const Input& sin, const Input& positions,
                 const Input& slots, const std::optional<Input>& query_norm, const std::optional<Input>& key_norm,
                 float eps) {
  const int64_t d = cos.ndim() == 2 ? static_cast<int64_t>(cos.shape(1)) : 0;
  const Cache cache = cache_of(keys, values, block_size, d);
  const int64_t width = (heads + 2 * cache.kv_heads) * d;
  float* data = data_of<float>(projected, "projected", {-1, width});
  const auto tokens = static_cast<int64_t>(projected.shape(0)), length = static_cast<int64_t>(cos.shape(0));
  Projected in = {data, data + heads * d, data + (heads + cache.kv_heads) * d, static_cast<size_t>(width), heads,
                  nullptr, nullptr, eps, data_of<const float>(cos, "cos", {-1, d}),
                  data_of<const float>(sin, "sin", {length, d}),
                  data_of<const int32_t>(positions, "positions", {tokens}),
                  data_of<const int32_t>(slots, "slots", {tokens})};
  if (query_norm) in.query_norm = data_of<const float>(*query_norm, "query_norm", {d});
  if (key_norm) in.key_norm = data_of<const float>(*key_norm, "key_norm", {d});
  const auto num_slots = static_cast<int64_t>(keys.shape(0)) * TILE;
  for (int64_t i = 0; i < tokens; i++) {
    require(in.positions[i] >= 0 && in.positions[i] < length, "positions must be within the tables of cos and sin");
    require(in.slots[i] >= 0 && in.slots[i] < num_slots, "slots must be within the cache");
  }
  nb::gil_scoped_release release;
  pool.run([&](int thread) {
    const auto part = [&](int i) { return static_cast<int>(tokens * i / pool.size()); };
    kernels.attention.write(cache, in, part(thread), part(thread + 1));
  });
}

// A step's rows and its plan.
struct Step {
  Step(const Input& query_starts, const Input& context_lens, const Input& block_tables) {
    const int32_t* lens = data_of<const int32_t>(context_lens, "context_lens", {-1});
    const auto n = static_cast<int64_t>(context_lens.shape(0));
    const int32_t* starts = data_of<const int32_t>(query_starts, "query_starts", {n + 1});
    const int32_t* tables = data_of<const int32_t>(block_tables, "block_tables", {n, -1});
    query_starts_.assign(starts, starts + n + 1);
    context_lens_.assign(lens, lens + n);
    block_tables_.assign(tables, tables + n * static_cast<int64_t>(block_tables.shape(1)));
    rows = {static_cast<int>(n), query_starts_.data(), context_lens_.data(), block_tables_.data(),
            static_cast<int>(block_tables.shape(1))};
    for (int64_t i = 0; i < n; i++) {
      require(starts[i] <= starts[i + 1], "query_starts must not go down");
      require(starts[i + 1] - starts[i] <= lens[i], "a row's context must hold its own tokens");
    }
  }

  void check(const Cache& cache, int64_t num_blocks) const {
    for (int row = 0; row < rows.num_rows; row++) {
      const int used = (rows.context_lens[row] + cache.block_size - 1) / cache.block_size;
      require(used <= rows.table_width, "block_tables are too narrow for a context");
      for (int i = 0; i < used; i++) {
        const int32_t block = rows.block_tables[row * rows.table_width + i];
        require(block >= 0 && block < num_blocks, "block_tables must name blocks of the cache");
      }
    }
  }

  std::vector<int32_t> query_starts_, context_lens_, block_tables_;
  Rows rows;
  AttentionPlan plan;
  Memory scratch, partials;
};

// Everything of a step's attention but the layer's cache.
class Attending {
 public:
  Attending(const Kernels& kernels, Pool& pool, Step& step, const Cache& cache, const Attended& io, int plan_threads)
      : kernels_(kernels.attention), pool_(pool), step_(step), io_(io) {
    step.plan.make(step.rows, io.heads, cache.kv_heads, cache.head_dim, plan_threads);
    each_ = kernels_.scratch_bytes(cache, io.heads);
    scratch_ = step.scratch.at_least(each_ * pool.size());
    partials_ = reinterpret_cast<float*>(step.partials.at_least(step.plan.num_partial_floats() * sizeof(float)));
  }

  // Called by every thread of the pool; `items` and `splits` are fresh.
  void layer(const Cache& cache, int thread, Items& items, Items& splits) const {
    const auto& tiles = step_.plan.tiles();
    const auto& split = step_.plan.splits();
    char* scratch = scratch_ + each_ * thread;
    const int count = static_cast<int>(tiles.size()) * cache.kv_heads;
    const auto item = [&](int i) { return AttentionItem{&tiles[i / cache.kv_heads], i % cache.kv_heads}; };
    for (int i = items.take(), next; i < count; i = next) {
      next = items.take();
      kernels_.attend(cache, step_.rows, io_, item(i), item(next < count ? next : i), scratch, partials_);
    }
    if (split.empty()) return;
    pool_.barrier();
    for (int i; (i = splits.take()) < static_cast<int>(split.size()) * cache.kv_heads;)
      kernels_.combine(cache, io_, tiles.data(), split[i / cache.kv_heads], i % cache.kv_heads, partials_);
  }

 private:
  const AttentionKernels& kernels_;
  Pool& pool_;
  const Step& step_;
  Attended io_;
  size_t each_;
  char* scratch_;
  float* partials_;
};

Attended io_of(const Step& step, const Cache& cache, const Input& query, const Array& out) {
  const int64_t tokens = step.query_starts_.back(), d = cache.head_dim;
  const float* q = data_of<const float>(query, "query", {tokens, -1, d});
  const auto heads = static_cast<int64_t>(query.shape(1));
  require(heads % cache.kv_heads == 0 && heads > 0, "query must have a multiple of the cache's heads");
  float* to = data_of<float>(out, "out", {tokens, heads, d});
  const auto width = static_cast<size_t>(heads * d);
  return {q, width, to, width, static_cast<int>(heads), 1.0f / std::sqrt(static_cast<float>(d))};
}

void attend(const Kernels& kernels, Pool& pool, Step& step, const Array& keys, const Array& values, int block_size,
            int head_dim, const Input& query, const Array& out, int plan_threads) {
  const Cache cache = cache_of(keys, values, block_size, head_dim);
  step.check(cache, static_cast<int64_t>(keys.shape(0)) * TILE / block_size);
  const Attended io = io_of(step, cache, query, out);
  nb::gil_scoped_release release;
  const Attending attending(kernels, pool, step, cache, io, plan_threads > 0 ? plan_threads : pool.size());
  Items items, splits;
  pool.run([&](int thread) { attending.layer(cache, thread, items, splits); });
}

// Seconds of each of `repeats` walks through all layers (pairs of keys and values), planned once a walk.
std::vector<double> time_attention(const Kernels& kernels, Pool& pool, Step& step,
                                   const std::vector<std::pair<Array, Array>>& layers, int block_size, int head_dim,
                                   const Input& query, const Array& out, int repeats) {
  std::vector<Cache> caches;
  for (const auto& [keys, values] : layers) {
    caches.push_back(cache_of(keys, values, block_size, head_dim));
    step.check(caches.back(), static_cast<int64_t>(keys.shape(0)) * TILE / block_size);
  }
  require(!caches.empty(), "layers must not be empty");
  const Attended io = io_of(step, caches[0], query, out);
  std::vector<Items> items(caches.size()), splits(caches.size());
  std::vector<double> seconds;
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    for (size_t layer = 0; layer < caches.size(); layer++) {
      items[layer].reset();
      splits[layer].reset();
    }
    const Attending attending(kernels, pool, step, caches[0], io, pool.size());
    pool.run([&](int thread) {
      for (size_t layer = 0; layer < caches.size(); layer++) {
        attending.layer(caches[layer], thread, items[layer], splits[layer]);
        pool.barrier();
      }
    });
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::enum_<KvFormat>(m, "KvFormat", "What the cache holds.")
      .value("f32", KvFormat::f32)
      .value("bf16", KvFormat::bf16)
      .value("i8", KvFormat::i8);
  m.def("write_cache", &write_cache, nb::arg("kernels"), nb::arg("pool"), nb::arg("keys"), nb::arg("values"),
        nb::arg("block_size"), nb::arg("projected"), nb::arg("heads"), nb::arg("cos"), nb::arg("sin"),
        nb::arg("positions"), nb::arg("slots"), nb::arg("query_norm") = nb::none(),
        nb::arg("key_norm") = nb::none(), nb::arg("eps") = 1e-6f,
        "projected [tokens, (heads + 2 * kv_heads) * d]: queries and keys are normed and rotated in place, keys and "
        "values stored in a layer's cache, uint16 (bfloat16) or float32 [tiles, kv_heads, 16 * d], or int8 with scales.");
  nb::class_<Step>(m, "AttentionStep", "The rows of a step.")
      .def(nb::init<const Input&, const Input&, const Input&>(), nb::arg("query_starts"), nb::arg("context_lens"),
           nb::arg("block_tables"))
      .def_prop_ro("num_splits", [](const Step& step) { return step.plan.splits().size(); });
  m.def("attend", &attend, nb::arg("kernels"), nb::arg("pool"), nb::arg("step"), nb::arg("keys"), nb::arg("values"),
        nb::arg("block_size"), nb::arg("head_dim"), nb::arg("query"), nb::arg("out"), nb::arg("plan_threads") = 0,
        "query [tokens, heads, d], rotated, to out of the same shape; plan_threads: plan as for so many threads.");
  m.def("time_attention", &time_attention, nb::arg("kernels"), nb::arg("pool"), nb::arg("step"), nb::arg("layers"),
        nb::arg("block_size"), nb::arg("head_dim"), nb::arg("query"), nb::arg("out"), nb::arg("repeats"),
        "Seconds of each walk through all layers (keys, values); the query is the same in all.");
}

}  // namespace llm
