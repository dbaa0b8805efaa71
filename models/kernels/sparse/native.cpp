// The chosen experts of a few tokens on a CPU: each expert's rows are read once, for all tokens that chose it.
// An XLA FFI call, compiled on the machine that asks for it (see native.py); float32.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
static int most_threads() { return omp_get_max_threads(); }
static int thread() { return omp_get_thread_num(); }
#else
static int most_threads() { return 1; }
static int thread() { return 0; }
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

static inline float activate(int64_t kind, float z) {
  switch (kind) {
    case 0: return z > 0 ? z : 0;                                    // relu
    case 1: return z > 0 ? z * z : 0;                                // relu2
    case 2: return 0.5f * z * (1 + std::erf(z * 0.70710678f));       // gelu
    case 3: return 0.5f * z * (1 + std::tanh(0.79788456f * (z + 0.044715f * z * z * z)));  // gelu_tanh
    case 4: return z / (1 + std::exp(-z));                           // silu
    case 5: return 1 / (1 + std::exp(-z));                           // sigmoid
    default: return std::tanh(z);
  }
}

static inline float dot(const float* a, const float* b, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

// Matrices are [E, n, D], biases [E, n]; what a layer lacks has no elements.
static ffi::Error SparseFeedForward(Floats x, Floats up, Floats gate, Floats up_bias, Floats gate_bias,
                                    Floats down, ffi::Buffer<ffi::S32> chosen, int64_t activation,
                                    ffi::ResultBuffer<ffi::F32> out) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t experts = up.dimensions()[0], size = up.dimensions()[1], picked = chosen.dimensions()[1];
  const bool gated = gate.element_count(), biased = up_bias.element_count(), gate_biased = gate_bias.element_count();
  const float *in = x.typed_data(), *ups = up.typed_data(), *gates = gate.typed_data(), *downs = down.typed_data();
  const float *up_shift = up_bias.typed_data(), *gate_shift = gate_bias.typed_data();

  std::vector<std::vector<int32_t>> users(experts);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < picked; ++j) {
      const int32_t e = chosen.typed_data()[t * picked + j];
      if (e < 0 || e >= experts) return ffi::Error::InvalidArgument("an expert's number is out of range");
      users[e].push_back(static_cast<int32_t>(t));
    }
  std::vector<int32_t> used;
  for (int64_t e = 0; e < experts; ++e)
    if (!users[e].empty()) used.push_back(static_cast<int32_t>(e));

  // Each thread has its own experts and its own sums, which are added in order: the same bits every time.
  std::vector<std::vector<float>> sums(most_threads());
#pragma omp parallel
  {
    std::vector<float>& own = sums[thread()];
    own.assign(tokens * width, 0.0f);
#pragma omp for schedule(static)
    for (int64_t u = 0; u < static_cast<int64_t>(used.size()); ++u) {
      const int64_t e = used[u];
      for (int64_t n = e * size; n < (e + 1) * size; ++n)
        for (const int32_t t : users[e]) {
          const float* row = in + t * width;
          float value = dot(row, ups + n * width, width) + (biased ? up_shift[n] : 0);
          if (gated) {
            const float z = dot(row, gates + n * width, width) + (gate_biased ? gate_shift[n] : 0);
            value *= activate(activation, z);
          } else {
            value = activate(activation, value);
          }
          if (value == 0) continue;  // a silent neuron's second row is not read
          const float* back = downs + n * width;
          float* sum = own.data() + t * width;
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) sum[i] += value * back[i];
        }
    }
  }
  float* total = out->typed_data();
  std::memset(total, 0, sizeof(float) * tokens * width);
  for (const auto& own : sums)
    for (size_t i = 0; i < own.size(); ++i) total[i] += own[i];
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(modicum_sparse_feed_forward, SparseFeedForward,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("activation")
                                  .Ret<Floats>());
