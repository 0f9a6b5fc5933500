// Half of gan_bce on plain pointers: what gan_bce.cpp checks and gan_bce.isa.cpp computes.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/storage.h"

namespace fastgan::cpu {

// stats[0], stats[2] = mean loss and mean sigmoid of n > 0 logits; gradient[n] = (sigmoid - target) / n. Both in float32, or
// float64 where the logits are.
FASTGAN_DECLARE(void run_gan_bce(Storage type, const void* logits, int64_t n, double target, void* stats, void* gradient);)

}  // namespace fastgan::cpu
