// Launcher of the gan_bce kernel; the mathematics is in fastgan/ops/gan_bce.py. Returns 0 or a cudaError_t.
#pragma once
#include <cstdint>

#include "cuda/element.h"

namespace fastgan::cuda {

// One half: n logits of type `element` and n fp32 gradients; n = 0 where it is absent.
struct BceHalf {
  const void* logits;
  int64_t n;
  double target;
  float* grad;
};

// stats[4] fp32: loss_real, loss_fake, D(x), D(G(z)); zeros for an absent half.
int gan_bce(Element element, BceHalf real, BceHalf fake, float* stats, void* stream);

}  // namespace fastgan::cuda
