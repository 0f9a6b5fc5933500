// Launchers of the bn_act kernels; the mathematics is in fastgan/ops/bn_act_eager.py. Each returns 0 or a cudaError_t.
// Pointers are device memory; mean, invstd, weight, bias and both sums are fp32 [C], all other tensors `element`.
#pragma once
#include <cstdint>

#include "cuda/element.h"

namespace fastgan::cuda {

// n * hw values per channel; in memory [n, hw, C] (channels-last, also [N, C] with hw = 1) or [n, C, hw].
struct BnShape {
  int64_t n, channels, hw;
  bool channels_last;
};

struct BnChannels {  // per-channel inputs
  const float *mean, *invstd, *weight, *bias;
};

// How many floats of workspace bn_stats and bn_act_reduce need.
int64_t bn_workspace(BnShape shape);

int bn_stats(Element element, BnShape shape, const void* y, float* mean, float* m2, float* workspace, void* stream);

int bn_act(Element element, BnShape shape, const void* y, BnChannels channels, float slope, void* z, void* stream);

int bn_act_reduce(Element element, BnShape shape, const void* dz, const void* y, BnChannels channels, float slope,
                  float* grad_weight, float* grad_bias, float* workspace, void* stream);

// count = 0: the statistics are constants, and grad_weight and grad_bias are not read.
int bn_act_backward(Element element, BnShape shape, const void* dz, const void* y, BnChannels channels, float slope,
                    const float* grad_weight, const float* grad_bias, int64_t count, void* dy, void* stream);

}  // namespace fastgan::cuda
