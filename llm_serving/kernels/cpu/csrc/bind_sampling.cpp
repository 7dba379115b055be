// Sampling for Python: a step's rows, divided among the pool.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "bind.hpp"
#include "bind_arrays.hpp"
#include "sample.hpp"

namespace nb = nanobind;

namespace llm {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Samples steps of a vocabulary; keeps memory to work in.
class RowSampler {
 public:
  RowSampler(const Kernels& kernels, Pool& pool, int width) : kernels_(kernels.sampling), pool_(pool), width_(width) {
    require(width > 0, "vocab_size must be positive");
    each_ = kernels_.scratch_bytes(width);
    scratch_.reset(static_cast<char*>(std::aligned_alloc(64, each_ * pool.size())));
    if (!scratch_) throw std::bad_alloc();
  }

  void sample(const std::optional<Array>& logits, const std::optional<Array>& adjusted,
              const std::optional<Input>& is_adjusted, const Input& records, const Input& positions,
              const std::optional<Input>& ranges, const std::optional<Input>& maxima, const Array& ids,
              const Array& logprobs, const Array& finite, const Array& top_ids, const Array& top_logprobs) {
    const uint8_t* packed = data_of<const uint8_t>(records, "records", {-1, sizeof(SamplingRecord)});
    const auto n = static_cast<int64_t>(records.shape(0));
    float* rows = logits ? data_of<float>(*logits, "logits", {n, width_}) : nullptr;
    const int num_ranges = llm::num_ranges(width_), num_maxima = llm::num_maxima(width_);
    const Summary* known = ranges ? summaries_of<const float>(*ranges, "ranges", n, width_) : nullptr;
    const float* known_maxima = maxima ? data_of<const float>(*maxima, "maxima", {n, num_maxima}) : nullptr;
    require(rows != nullptr || known != nullptr, "either logits or ranges must be there");
    require(rows == nullptr || (known == nullptr) == (known_maxima == nullptr), "ranges and maxima of logits go together");
    float* other = adjusted ? data_of<float>(*adjusted, "adjusted", {n, width_}) : nullptr;
    const uint8_t* flags = is_adjusted ? data_of<const uint8_t>(*is_adjusted, "is_adjusted", {n}) : nullptr;
    require((other == nullptr) == (flags == nullptr), "adjusted and is_adjusted go together");
    const int32_t* places = data_of<const int32_t>(positions, "positions", {n});
    int32_t* id = data_of<int32_t>(ids, "ids", {n});
    float* logprob = data_of<float>(logprobs, "logprobs", {n});
    uint8_t* is_finite = data_of<uint8_t>(finite, "finite", {n});
    int32_t* tops = data_of<int32_t>(top_ids, "top_ids", {n, -1});
    const auto num_top = static_cast<int64_t>(top_ids.shape(1));
    float* top_values = data_of<float>(top_logprobs, "top_logprobs", {n, num_top});
    std::vector<SamplingRecord> asked(static_cast<size_t>(n));
    std::memcpy(asked.data(), packed, asked.size() * sizeof(SamplingRecord));
    for (const SamplingRecord& record : asked)
      require(std::min(record.num_logprobs, width_) <= num_top, "top_ids must be as wide as the largest num_logprobs");
    for (const SamplingRecord& record : asked)
      require(rows != nullptr || (record.num_logprobs == 0 && !(record.temperature > 0) && flags == nullptr),
              "without logits only greedy rows can be sampled");

    nb::gil_scoped_release release;
    if (known == nullptr) {
      ranges_.resize(static_cast<size_t>(n) * num_ranges);
      maxima_.resize(static_cast<size_t>(n) * num_maxima);
    }
    Items parts, whole;
    pool_.run([&](int thread) {
      for (int i; known == nullptr && (i = parts.take()) < n * num_ranges;) {
        const int64_t row = i / num_ranges;
        const int begin = i % num_ranges * SUMMARY_COLUMNS;
        ranges_[i] = kernels_.summarise(rows + row * width_ + begin, begin, std::min(begin + SUMMARY_COLUMNS, width_),
                                        summed_temperature(asked[row]),
                                        maxima_.data() + row * num_maxima + llm::num_maxima(begin));
      }
      if (known == nullptr) pool_.barrier();
      for (int i; (i = whole.take()) < n;) {
        Digest digest{(known != nullptr ? known : ranges_.data()) + static_cast<int64_t>(i) * num_ranges, {}, nullptr};
        if (rows != nullptr)
          digest.maxima = (known != nullptr ? known_maxima : maxima_.data()) + static_cast<int64_t>(i) * num_maxima;
        digest.row = kernels_.merge(digest.ranges, num_ranges, summed_temperature(asked[i]));
        float* changed = flags != nullptr && flags[i] ? other + static_cast<int64_t>(i) * width_ : nullptr;
        float* own = rows != nullptr ? rows + static_cast<int64_t>(i) * width_ : nullptr;
        const SampledRow sampled = sample_row(kernels_, own, changed, width_, digest,
                                              asked[i], places[i], tops + i * num_top, top_values + i * num_top,
                                              scratch_.get() + each_ * thread);
        id[i] = sampled.id;
        logprob[i] = sampled.logprob;
        is_finite[i] = sampled.finite;
      }
    });
  }

 private:
  const SamplingKernels& kernels_;
  Pool& pool_;
  int width_;
  size_t each_;
  std::unique_ptr<char, Free> scratch_;
  std::vector<Summary> ranges_;  // of a step of which nothing is known
  std::vector<float> maxima_;
};

}  // namespace

void bind_sampling(nb::module_& m) {
  nb::class_<RowSampler>(m, "RowSampler", "Samples steps of a vocabulary; keeps memory to work in.")
      .def(nb::init<const Kernels&, Pool&, int>(), nb::arg("kernels"), nb::arg("pool"), nb::arg("vocab_size"),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("sample", &RowSampler::sample, nb::arg("logits").none(), nb::arg("adjusted").none(),
           nb::arg("is_adjusted").none(), nb::arg("records"), nb::arg("positions"), nb::arg("ranges").none(),
           nb::arg("maxima").none(), nb::arg("ids"), nb::arg("logprobs"), nb::arg("finite"),
           nb::arg("top_ids"), nb::arg("top_logprobs"),
           "One id for each row of logits [n, vocab], which it may overwrite: see csrc/sample.hpp.  records are "
           "SAMPLING_DTYPE as uint8 [n, 48], ranges and maxima what Plan.head wrote of the same logits and records: with "
           "ranges greedy rows need no logits.  What comes out is written to the last five.");
  m.def("num_ranges", &num_ranges, nb::arg("width"), "Of a row of so many logits; see Digest in csrc/sampling_kernels.hpp.");
  m.def("num_maxima", &num_maxima, nb::arg("width"), "Of a row of so many logits; see Digest in csrc/sampling_kernels.hpp.");
  m.def("uniform", &uniform, nb::arg("seed"), nb::arg("position"), nb::arg("sample_index"));
}

}  // namespace llm
