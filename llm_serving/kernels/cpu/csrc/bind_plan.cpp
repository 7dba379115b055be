// Python: a model's plan.  It holds references to all that it points into.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <vector>

#include "bind.hpp"
#include "bind_arrays.hpp"
#include "bind_linear.hpp"
#include "plan.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace llm {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Hidden = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require_size(size_t size, int expected, const char* what) {
  require(size == static_cast<size_t>(expected),
          std::string(what) + " must have " + std::to_string(expected) + " values, not " + std::to_string(size));
}

void require_shape(const PackedWeight& weight, int n, int k, const char* what) {
  require(weight.n == n && weight.k == k,
          std::string(what) + " must be [" + std::to_string(n) + ", " + std::to_string(k) + "], not [" +
              std::to_string(weight.n) + ", " + std::to_string(weight.k) + "]");
}

ModelShape make_shape(int hidden_size, int num_heads, int num_kv_heads, int head_dim, int intermediate_size, float eps,
                      int block_size, KvFormat kv_format) {
  require(hidden_size >= 1 && num_heads >= 1 && num_kv_heads >= 1 && intermediate_size >= 1,
          "sizes must be at least 1");
  require(num_heads % num_kv_heads == 0, "num_kv_heads must divide num_heads");
  require(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= MAX_HEAD_DIM, "head_dim must be even, 2 to 1024");
  require(block_size >= TILE && block_size % TILE == 0, "block_size must be a multiple of 16");
  require(intermediate_size % (PANEL / 2) == 0, "intermediate_size must be a multiple of 16");
  return {hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, eps, block_size, kv_format};
}

class BoundPlan {
 public:
  BoundPlan(nb::object kernels, nb::object pool, const ModelShape& shape, Matrix<float> cos, Matrix<float> sin)
      : plan_(nb::cast<const Kernels&>(kernels), nb::cast<Pool&>(pool), shape, cos.data(), sin.data()),
        max_model_len_(static_cast<int>(cos.shape(0))) {
    for (const auto& table : {cos, sin})
      require(table.shape(1) == static_cast<size_t>(shape.head_dim) && table.shape(0) == cos.shape(0),
              "cos and sin must be [max_model_len, head_dim]");
    keep(kernels), keep(pool), keep(nb::cast(cos)), keep(nb::cast(sin));
  }

  void add_layer(Vector<float> input_norm, nb::object qkv, nb::object out, Vector<float> post_norm,
                 nb::object gate_up, nb::object down, std::optional<Vector<float>> query_norm,
                 std::optional<Vector<float>> key_norm) {
    const ModelShape& shape = plan_.shape();
    const int query_size = shape.num_heads * shape.head_dim;
    require_size(input_norm.size(), shape.hidden_size, "input_norm");
    require_size(post_norm.size(), shape.hidden_size, "post_norm");
    require(query_norm.has_value() == key_norm.has_value(), "query_norm and key_norm go together");
    if (query_norm) require_size(query_norm->size(), shape.head_dim, "query_norm");
    if (key_norm) require_size(key_norm->size(), shape.head_dim, "key_norm");
    const Packed packed[] = {
        weight(qkv, query_size + 2 * shape.num_kv_heads * shape.head_dim, shape.hidden_size, "qkv"),
        weight(out, shape.hidden_size, query_size, "out"),
        weight(gate_up, 2 * shape.intermediate_size, shape.hidden_size, "gate_up"),
        weight(down, shape.hidden_size, shape.intermediate_size, "down")};
    plan_.add_layer({input_norm.data(), packed[0], packed[1], post_norm.data(), packed[2], packed[3],
                     query_norm ? query_norm->data() : nullptr, key_norm ? key_norm->data() : nullptr});
    keep(nb::cast(input_norm)), keep(nb::cast(post_norm));
    if (query_norm) keep(nb::cast(*query_norm)), keep(nb::cast(*key_norm));
  }

  void set_head(Vector<float> norm, nb::object head) {
    const int hidden_size = plan_.shape().hidden_size;
    require_size(norm.size(), hidden_size, "norm");
    plan_.set_head(norm.data(), weight(head, nb::cast<const PackedWeight&>(head).n, hidden_size, "head"));
    keep(nb::cast(norm));
  }

  // Addresses of each layer's keys and values, and how many slots they have.
  void set_cache(const std::vector<std::pair<uintptr_t, uintptr_t>>& layers, int num_blocks) {
    require(static_cast<int>(layers.size()) == plan_.num_layers(), "cache must have an entry for each layer");
    std::vector<std::pair<void*, void*>> caches;
    for (const auto& [keys, values] : layers) {
      require(keys % 64 == 0 && values % 64 == 0 && keys != 0 && values != 0, "caches must be aligned to 64 bytes");
      caches.emplace_back(reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values));
    }
    plan_.set_cache(std::move(caches));
    num_blocks_ = num_blocks;
  }

  void begin(Vector<int32_t> positions, Vector<int32_t> slots, Vector<int32_t> query_starts,
             Vector<int32_t> context_lens, Matrix<int32_t> block_tables, std::optional<Vector<int32_t>> lasting) {
    const int num_tokens = static_cast<int>(positions.size()), num_rows = static_cast<int>(context_lens.size());
    require_size(slots.size(), num_tokens, "slots");
    require_size(query_starts.size(), num_rows + 1, "query_starts");
    require(static_cast<int>(block_tables.shape(0)) == num_rows, "block_tables must have a row for each context_len");
    const int num_lasting = lasting ? static_cast<int>(lasting->size()) : 0;
    for (int i = 0; i < num_lasting; i++)
      require(lasting->data()[i] < num_tokens && lasting->data()[i] > (i > 0 ? lasting->data()[i - 1] : -1),
              "lasting must rise within the step's tokens");
    require(query_starts.data()[num_rows] == num_tokens, "query_starts must end with the tokens");
    for (int i = 0; i < num_tokens; i++)
      require(positions.data()[i] >= 0 && positions.data()[i] < max_model_len_, "positions must be below max_model_len");
    step_ = {positions, slots, query_starts, context_lens, block_tables, lasting};
    plan_.begin({num_tokens,
                 positions.data(),
                 slots.data(),
                 {num_rows, query_starts.data(), context_lens.data(), block_tables.data(),
                  static_cast<int>(block_tables.shape(1))},
                 num_lasting > 0 ? lasting->data() : lasting ? &no_token_ : nullptr,
                 num_lasting});
  }

  void run_layers(Hidden hidden, int start, int stop) {
    require(hidden.shape(0) == static_cast<size_t>(plan_.num_tokens()) &&
                hidden.shape(1) == static_cast<size_t>(plan_.shape().hidden_size),
            "hidden must be [tokens of the step, hidden_size]");
    require(0 <= start && start <= stop && stop <= plan_.num_layers(), "start and stop must be layers of the plan");
    require(num_blocks_ > 0, "set_cache comes first");
    nb::gil_scoped_release released;
    plan_.run_layers(hidden.data(), start, stop);
  }

  void head(Matrix<float> hidden, Vector<int32_t> tokens, const std::optional<Input>& records, const Array& ranges,
            const std::optional<Array>& logits, const std::optional<Array>& maxima) {
    const int count = static_cast<int>(tokens.size()), width = plan_.vocab_size();
    require(width > 0, "set_head comes first");
    require(hidden.shape(1) == static_cast<size_t>(plan_.shape().hidden_size), "hidden must be [.., hidden_size]");
    for (int i = 0; i < count; i++)
      require(tokens.data()[i] >= 0 && static_cast<size_t>(tokens.data()[i]) < hidden.shape(0),
              "tokens must be rows of hidden");
    require(logits.has_value() == maxima.has_value(), "logits and maxima go together");
    Plan::Head out{summaries_of<float>(ranges, "ranges", count, width), nullptr, nullptr, nullptr};
    if (logits) {
      out.logits = data_of<float>(*logits, "logits", {count, width});
      out.maxima = data_of<float>(*maxima, "maxima", {count, num_maxima(width)});
    }
    if (records) {
      const uint8_t* packed = data_of<const uint8_t>(*records, "records", {count, sizeof(SamplingRecord)});
      records_.resize(count);
      if (count > 0) std::memcpy(records_.data(), packed, count * sizeof(SamplingRecord));
      out.records = records_.data();
    }
    nb::gil_scoped_release released;
    plan_.run_head(hidden.data(), tokens.data(), count, out);
  }

  // Milliseconds since the last call in each part, if `is_profiled`.
  nb::dict spent() {
    static const char* const names[NUM_PARTS] = {"norm", "qkv", "write", "attend", "out", "gate_up", "down", "head"};
    nb::dict found;
    for (int i = 0; i < NUM_PARTS; i++) found[names[i]] = plan_.spent_ns[i] / 1e6, plan_.spent_ns[i] = 0;
    return found;
  }

  bool is_profiled() const { return plan_.is_profiled; }
  void set_profiled(bool on) { plan_.is_profiled = on; }
  int num_layers() const { return plan_.num_layers(); }

 private:
  struct Arrays {
    Vector<int32_t> positions, slots, query_starts, context_lens;
    Matrix<int32_t> block_tables;
    std::optional<Vector<int32_t>> lasting;
  };

  Packed weight(const nb::object& object, int n, int k, const char* what) {
    const auto& packed = nb::cast<const PackedWeight&>(object);
    require_shape(packed, n, k, what);
    keep(object);
    return packed.view();
  }

  void keep(nb::object object) { kept_.push_back(std::move(object)); }

  const int32_t no_token_ = 0;
  std::vector<nb::object> kept_;
  Plan plan_;
  int max_model_len_, num_blocks_ = 0;
  Arrays step_;
  std::vector<SamplingRecord> records_;
};

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<BoundPlan>(m, "Plan", "All layers of a model, carried out in one call; see csrc/plan.hpp.")
      .def(
          "__init__",
          [](BoundPlan* self, nb::object kernels, nb::object pool, int hidden_size, int num_heads, int num_kv_heads,
             int head_dim, int intermediate_size, float eps, int block_size, KvFormat kv_format, Matrix<float> cos,
             Matrix<float> sin) {
            const ModelShape shape = make_shape(hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, eps,
                                                block_size, kv_format);
            new (self) BoundPlan(kernels, pool, shape, cos, sin);
          },
          "kernels"_a, "pool"_a, nb::kw_only(), "hidden_size"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
          "intermediate_size"_a, "eps"_a, "block_size"_a, "kv_format"_a, "cos"_a, "sin"_a)
      .def("add_layer", &BoundPlan::add_layer, nb::kw_only(), "input_norm"_a, "qkv"_a, "out"_a, "post_norm"_a,
           "gate_up"_a, "down"_a, "query_norm"_a = nb::none(), "key_norm"_a = nb::none())
      .def("set_head", &BoundPlan::set_head, "norm"_a, "head"_a)
      .def("set_cache", &BoundPlan::set_cache, "layers"_a, "num_blocks"_a)
      .def("begin", &BoundPlan::begin, "positions"_a, "slots"_a, "query_starts"_a, "context_lens"_a, "block_tables"_a,
           "lasting"_a = nb::none(),
           "The step that run_layers works on from now; the arrays must not change meanwhile.  If lasting [..] is\n"
           "given, the model's last layer follows only these tokens, and of the others nothing is left.")
      .def("run_layers", &BoundPlan::run_layers, "hidden"_a, "start"_a, "stop"_a,
           "hidden [tokens, hidden_size] float32 through layers [start, stop), in place.")
      .def("head", &BoundPlan::head, "hidden"_a, "tokens"_a, "records"_a.none(), "ranges"_a, "logits"_a.none(),
           "maxima"_a.none(),
           "Rows of hidden through the last norm and the head: of each what its ranges amount to, SUMMARY_DTYPE as\n"
           "float32 [tokens, ranges, 4], with the sums that its SAMPLING_DTYPE asks for (uint8 [tokens, 48]); its\n"
           "logits and their maxima float32, unless None.  See Digest in csrc/sampling_kernels.hpp.")
      .def("spent", &BoundPlan::spent)
      .def_prop_rw("is_profiled", &BoundPlan::is_profiled, &BoundPlan::set_profiled)
      .def_prop_ro("num_layers", &BoundPlan::num_layers);
}

}  // namespace llm
