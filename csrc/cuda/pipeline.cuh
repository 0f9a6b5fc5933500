// A loop that keeps several loads under way.
#pragma once
#include "cuda/device.cuh"

namespace fastgan::cuda {

constexpr int in_flight = 4;  // loads of a thread

// Visits `first`, `first + step`, ... below `end`: loads several before it uses the first of them.
template <class Load, class Use>
__device__ __forceinline__ void pipeline(int64_t first, int64_t end, int64_t step, Load&& load, Use&& use) {
  int64_t i = first_turn(first, end, step);
  for (; i + (in_flight - 1) * step < end; i += in_flight * step) {
    decltype(load(i)) loaded[in_flight];
#pragma unroll
    for (int k = 0; k < in_flight; k++) loaded[k] = load(i + k * step);
#pragma unroll
    for (int k = 0; k < in_flight; k++) use(i + k * step, loaded[k]);
  }
  for (; i < end; i += step) use(i, load(i));
}

}  // namespace fastgan::cuda
