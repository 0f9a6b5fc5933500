#include "cuda/gan_bce.h"

#include "cuda/dispatch.cuh"

namespace fastgan::cuda {
namespace {

constexpr int bce_threads = 512;  // a batch of logits is small: one block a half, one launch for both

// Block 0 takes the real half, block 1 the fake one.
template <class T>
__global__ void __launch_bounds__(bce_threads) bce(BceHalf real, BceHalf fake, float* stats) {
  __shared__ float of_warp[2][bce_threads / warp];
  BceHalf half = blockIdx.x == 0 ? real : fake;
  auto* logits = static_cast<const T*>(half.logits);
  float per_n = half.n ? 1.f / static_cast<float>(half.n) : 0.f, loss = 0, belief = 0;
  for (int64_t i = threadIdx.x; i < half.n; i += bce_threads) {
    // -t log p - (1 - t) log(1 - p) = max(x, 0) - t x + log(1 + exp(-|x|)), which no logit can overflow.
    float x = to_float(logits[i]), e = expf(-fabsf(x));
    float p = x >= 0 ? 1.f / (1.f + e) : e / (1.f + e);
    loss += fmaxf(x, 0.f) - half.target * x + log1pf(e);
    belief += p;
    half.grad[i] = (p - half.target) * per_n;
  }
  loss = warp_sum(loss);
  belief = warp_sum(belief);
  if (threadIdx.x % warp == 0) {
    of_warp[0][threadIdx.x / warp] = loss;
    of_warp[1][threadIdx.x / warp] = belief;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    float sum = 0;
    for (int w = 0; w < bce_threads / warp; w++) sum += of_warp[threadIdx.x][w];
    stats[threadIdx.x * 2 + blockIdx.x] = sum * per_n;
  }
}

}  // namespace

int gan_bce(Element element, BceHalf real, BceHalf fake, float* stats, void* stream) {
  return by_element(element, [&]<class T>() {
    return FASTGAN_LAUNCH((bce<T>), 2, bce_threads, 0, stream, real, fake, stats);
  });
}

}  // namespace fastgan::cuda
