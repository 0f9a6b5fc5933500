// Two sums over many threads, taken together and in a fixed order.
#pragma once
#include "cuda/device.cuh"

namespace fastgan::cuda {

constexpr int sums = 2;  // taken in one pass

struct Sums {
  float of[sums] = {};
};

// Sums of many Sums that keep what each addition rounds away (Neumaier, 1974): rounded + lost.
struct Total {
  Sums rounded, lost;

  __device__ __forceinline__ void add(const Total& other) { add(other.rounded, other.lost); }
  __device__ __forceinline__ void add(const Sums& terms, const Sums& terms_lost = {}) {
#pragma unroll
    for (int i = 0; i < sums; i++) {
      float before = rounded.of[i], term = terms.of[i], sum = before + term;
      float gone = fabsf(before) >= fabsf(term) ? (before - sum) + term : (term - sum) + before;
      if (isfinite(sum)) lost.of[i] += gone + terms_lost.of[i];
      rounded.of[i] = sum;
    }
  }
  // Adds the total of the lane whose number differs in `bits`.
  __device__ __forceinline__ void add_lane(int bits) {
    Total other;
#pragma unroll
    for (int i = 0; i < sums; i++) {
      other.rounded.of[i] = __shfl_xor_sync(all_lanes, rounded.of[i], bits);
      other.lost.of[i] = __shfl_xor_sync(all_lanes, lost.of[i], bits);
    }
    add(other);
  }
  __device__ __forceinline__ Sums value() const {
    Sums result;
#pragma unroll
    for (int i = 0; i < sums; i++) result.of[i] = rounded.of[i] + lost.of[i];
    return result;
  }
};

}  // namespace fastgan::cuda
