// Launcher of the adam_ema kernel; the mathematics is in fastgan/ops/adam_ema.py. Returns 0 or a cudaError_t.
#pragma once
#include <cstdint>

namespace fastgan::cuda {

struct AdamTensor {  // fp32, n elements each; ema may be null
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq, *ema;
  int64_t n;
};

struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // AdamW
  double ema_decay;
};

// Updates all tensors in as few launches as their number allows. `step` (device memory) is the count of updates, this
// one included.
int adam_ema(const AdamTensor* tensors, int count, const float* step, AdamOptions options, void* stream);

}  // namespace fastgan::cuda
