// The update of adam_ema on plain pointers: what adam_ema.cpp checks and adam_ema.isa.cpp computes.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace fastgan::cpu {

template <class T>
struct AdamTensor {  // n elements each; ema may be null
  T* param;
  const T* grad;
  T *exp_avg, *exp_avg_sq, *ema;
  int64_t n;
};

// The options as the elements use them; differences such as 1 - beta2^step are taken in double.
template <class T>
struct AdamFactors {
  T keep, decay, fresh1, beta2, fresh2, step_size, root_correction, eps, fresh_ema;
};

FASTGAN_DECLARE(void run_adam_ema(const std::vector<AdamTensor<float>>& tensors, const AdamFactors<float>& factors);
                void run_adam_ema(const std::vector<AdamTensor<double>>& tensors, const AdamFactors<double>& factors);)

}  // namespace fastgan::cpu
