// The split operations of bn_act on plain pointers: what bn_act.cpp checks and bn_act.isa.cpp computes.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/storage.h"

namespace fastgan::cpu {

enum class BnActStep { statistics, apply, reduce, backward };

// y is [N, S, C] (channels-last) or [N, C, S] (contiguous); per-channel arrays are float32, or float64 where y is.
struct BnAct {
  BnActStep step;
  Storage storage;
  bool channels_last;
  int64_t N, C, S;
  double slope = 1;
  const void* y = nullptr;
  const void* dz = nullptr;
  const void* constants = nullptr;  // [mean, scale, shift] rows, and for backward [A, B, C] after them
  void* out = nullptr;              // apply, backward: like y; statistics, reduce: [2, C]
};

FASTGAN_DECLARE_WIDE(void run_bn_act(const BnAct& p);)

}  // namespace fastgan::cpu
