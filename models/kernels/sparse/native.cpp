// The chosen experts of a few tokens on a CPU: each expert's rows are read once, for all tokens that chose it.
// An XLA FFI call, compiled on the machine that asks for it (see native.py); float32.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

static inline float activate(int64_t kind, float z) {
  switch (kind) {
    case 0: return z < 0 ? 0 : z;                                    // relu; what is not a number stays so
    case 1: return z < 0 ? 0 : z * z;                                // relu2
    case 2: return 0.5f * z * (1 + std::erf(z * 0.70710678f));       // gelu
    case 3: return 0.5f * z * (1 + std::tanh(0.79788456f * (z + 0.044715f * z * z * z)));  // gelu_tanh
    case 4: return z / (1 + std::exp(-z));                           // silu
    case 5: return 1 / (1 + std::exp(-z));                           // sigmoid
    default: return std::tanh(z);
  }
}

// One sum: four of them over quarters of a row read memory in four places, which took 2.4 times as long.
static inline float dot(const float* a, const float* b, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

// Matrices are [E, n, D], biases [E, n]; a null pointer is what the layer lacks.
struct Layer {
  const float *x, *up, *gate, *up_bias, *gate_bias, *down;
  int64_t width, size, activation;
};

// Adds the outputs of expert e to `sums [N, D]` of the tokens that chose it.
static void add_expert(const Layer& layer, int64_t e, const std::vector<int32_t>& users, float* sums) {
  const int64_t width = layer.width;
  for (int64_t n = e * layer.size; n < (e + 1) * layer.size; ++n)
    for (const int32_t t : users) {
      const float* row = layer.x + t * width;
      float value = dot(row, layer.up + n * width, width) + (layer.up_bias ? layer.up_bias[n] : 0);
      if (layer.gate) {
        const float z = dot(row, layer.gate + n * width, width) + (layer.gate_bias ? layer.gate_bias[n] : 0);
        value *= activate(layer.activation, z);
      } else {
        value = activate(layer.activation, value);
      }
      if (value == 0) continue;  // a silent neuron's second row is not read
      const float* back = layer.down + n * width;
      float* sum = sums + t * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] += value * back[i];
    }
}

// Experts in parts, each with its own sums, which are added in order: the same bits whichever thread does what,
// with so many threads.
// A part is done by who takes it first; the caller takes parts too, so that it waits only for those begun.
struct Job {
  Layer layer;
  int64_t tokens;
  std::vector<std::vector<int32_t>> users;  // tokens by expert
  std::vector<int32_t> used;                // experts that any token chose
  std::vector<std::vector<float>> sums;     // [N, D] of each part
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    const int64_t parts = sums.size(), count = used.size();
    for (int64_t p; (p = next.fetch_add(1)) < parts; done.fetch_add(1, std::memory_order_release)) {
      sums[p].assign(tokens * layer.width, 0.0f);
      for (int64_t u = p * count / parts; u < (p + 1) * count / parts; ++u)
        add_expert(layer, used[u], users[used[u]], sums[p].data());
    }
  }
};

static const float* values(const Floats& given) { return given.element_count() ? given.typed_data() : nullptr; }

constexpr int64_t PARTS = 4;       // of each thread
constexpr int64_t GRAIN = 1 << 16;  // multiplications that are worth a further thread

static ffi::Error SparseFeedForward(ffi::ThreadPool pool, Floats x, Floats up, Floats gate, Floats up_bias,
                                    Floats gate_bias, Floats down, ffi::Buffer<ffi::S32> chosen,
                                    int64_t activation, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t experts = up.dimensions()[0], size = up.dimensions()[1], picked = chosen.dimensions()[1];
  auto job = std::make_shared<Job>();  // a thread that comes too late still looks at it
  job->layer = {x.typed_data(), up.typed_data(), values(gate), values(up_bias), values(gate_bias),
                down.typed_data(), width, size, activation};
  job->tokens = tokens;
  job->users.resize(experts);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < picked; ++j) {
      const int32_t e = chosen.typed_data()[t * picked + j];
      if (e < 0 || e >= experts) return ffi::Error::InvalidArgument("an expert's number is out of range");
      job->users[e].push_back(static_cast<int32_t>(t));
    }
  for (int64_t e = 0; e < experts; ++e)
    if (!job->users[e].empty()) job->used.push_back(static_cast<int32_t>(e));

  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), used = job->used.size();
  // A part's sums are added by the caller alone, at the price of one row of a matrix: with many threads more
  // parts than the root of the rows would cost more than they share out.
  const int64_t rows = picked * size * (job->layer.gate ? 3 : 2);
  const int64_t most = std::max<int64_t>(static_cast<int64_t>(std::sqrt(static_cast<double>(rows))), 1);
  const int64_t parts = std::min({used, PARTS * threads, most});
  job->sums.resize(parts);
  const int64_t worth = tokens * rows * width / GRAIN;
  for (int64_t helper = std::min({threads - 1, parts - 1, worth}); helper > 0; --helper)
    pool.Schedule([job] { job->work(); });
  job->work();
  while (job->done.load(std::memory_order_acquire) < parts) std::this_thread::yield();

  float* total = out->typed_data();
  std::fill(total, total + tokens * width, 0.0f);
  for (const auto& own : job->sums)
    for (size_t i = 0; i < own.size(); ++i) total[i] += own[i];
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(modicum_sparse_feed_forward, SparseFeedForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("activation")
                                  .Ret<Floats>());
