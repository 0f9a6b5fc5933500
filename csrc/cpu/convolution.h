// A 4x4 stride-2 padding-1 convolution between a large side [N, LH, LW, C] and a small side [N, H, W, K], as plain
// pointers: what convolution.cpp checks and convolution.isa.cpp or, on AMX, convolution_tiles.isa.cpp computes. Weight
// [K, C, 4, 4], contiguous or channels-last.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace fastgan::cpu {

// See block.h: without constants plain; with constants phi(s*(a - mu) + beta); with b and constants A*a + B*(b - mu) + C.
struct OperandView {
  const void* a = nullptr;
  const void* b = nullptr;
  const void* constants = nullptr;
  double slope = 1;
  int64_t images_per_set = 1;  // of constants
};

// With sums [2, channels] for each set the statistics of the result; with sums, y and constants its product with phi'(v(y)) and two sums.
struct ResultView {
  void* out = nullptr;
  void* sums = nullptr;
  const void* y = nullptr;
  const void* constants = nullptr;
  double slope = 1;
  int64_t images_per_set = 1;  // of constants and sums
};

enum class Direction { to_small, to_large, to_weight };
constexpr int64_t thin_channels = 4;  // of the large side: up to so many have ways of their own
constexpr int64_t scheme_automatic = 0, scheme_winograd = 1, scheme_direct = 2;

struct Convolution {
  Direction direction;
  int64_t N, C, LH, LW, K, H, W, scheme;
  const void* weight = nullptr;
  bool weight_channels_last = false;  // of to_weight: the result's
  OperandView large, small;  // the operands that the direction reads
  ResultView result;
};

// Without AVX2 convolutions are left to the library (fastgan/nn/stack_cpu.py), so the plain set has no copy.
// fp64 is for tests, which run derivatives through these kernels: one copy will do. In bf16 both sides are bf16, constants, sums,
// weight and its gradient fp32.
#define FASTGAN_CONVOLUTIONS void run_convolution(const Convolution& c); void run_convolution_bf16(const Convolution& c);
FASTGAN_IF_AVX2(namespace avx2 { FASTGAN_CONVOLUTIONS void run_convolution_fp64(const Convolution& c); })
FASTGAN_IF_AVX512(namespace avx512 { FASTGAN_CONVOLUTIONS })
FASTGAN_IF_AMX(namespace amx { FASTGAN_CONVOLUTIONS })
#undef FASTGAN_CONVOLUTIONS

}  // namespace fastgan::cpu
