// What the forward and the backward pass of bn_act share.
#pragma once
#include "cuda/channels.cuh"

namespace fastgan::cuda {

// v = scale * (y - mean) + bias, by the same instructions forward and backward, so that both see the same sign.
struct Normalise {
  float mean, scale, bias;
  __device__ float operator()(float y) const { return fmaf(scale, y - mean, bias); }
};

__device__ __forceinline__ Normalise normalise(const BnChannels& of, int c) {
  return {of.mean[c], of.weight[c] * of.invstd[c], of.bias[c]};
}

}  // namespace fastgan::cuda
