// gan_bce on plain pointers: what gan_bce.cpp checks and gan_bce.isa.cpp computes.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/storage.h"

namespace fastgan::cpu {

// The real or the fake logits: n > 0 of them. stats[0], stats[2] = mean loss and mean sigmoid; gradient[n] = (sigmoid - target) / n.
// Both are float32, or float64 where the logits are.
struct Half {
  const void* logits;
  int64_t n;
  double target;
  void *stats, *gradient;
};

FASTGAN_DECLARE_WIDE(void run_gan_bce(Storage type, const Half* halves, int64_t count);)

}  // namespace fastgan::cpu
