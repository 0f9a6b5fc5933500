#include "cuda/gan_bce.h"

#include "cuda/dispatch.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/total.cuh"

namespace fastgan::cuda {
namespace {

constexpr int bce_threads = 512;  // a batch of logits is small: one block a half, one launch for both

// Block 0 takes the real half, block 1 the fake one.
template <class T>
__global__ void __launch_bounds__(bce_threads) bce(BceHalf real, BceHalf fake, float* stats) {
  __shared__ Sums of_warp[bce_threads / warp];  // of the loss and of the belief
  BceHalf half = blockIdx.x == 0 ? real : fake;
  auto* logits = static_cast<const T*>(half.logits);
  float n = static_cast<float>(half.n);
  float target = static_cast<float>(half.target), other = static_cast<float>(1. - half.target);
  Total total;
  auto take = [&](T logit) {  // adds its loss, gives its gradient
    // -log p = max(-x, 0) + log(1 + exp(-|x|)) and -log(1 - p) = max(x, 0) + ..., which no logit can overflow.
    float x = to_float(logit), e = expf(-fabsf(x)), log_sum = log1pf(e), loss = 0;
    float p = x >= 0 ? 1.f / (1.f + e) : e / (1.f + e);
    if (target != 0) loss = target * (fmaxf(-x, 0.f) + log_sum);
    if (other != 0) loss = fmaf(other, fmaxf(x, 0.f) + log_sum, loss);
    total.add(Sums{loss, p});
    return (p - target) / n;
  };
  constexpr int size = Vector<T>::size, floats = Vector<float>::size;
  bool aligned = (reinterpret_cast<uintptr_t>(logits) | reinterpret_cast<uintptr_t>(half.grad)) % 16 == 0;
  int64_t vectors = aligned ? half.n / size : 0;
  pipeline(
      threadIdx.x, vectors, bce_threads, [&](int64_t i) { return load_vector(logits + i * size); },
      [&](int64_t i, const Vector<T>& of) {
#pragma unroll
        for (int first = 0; first < size; first += floats) {
          Vector<float> grad;
#pragma unroll
          for (int k = 0; k < floats; k++) grad.v[k] = take(of.v[first + k]);
          store_vector(half.grad + i * size + first, grad);
        }
      });
  pipeline(
      vectors * size + threadIdx.x, half.n, bce_threads, [&](int64_t i) { return logits[i]; },
      [&](int64_t i, T logit) { half.grad[i] = take(logit); });
  for (int bits = warp / 2; bits > 0; bits /= 2) total.add_lane(bits);
  if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = total.value();
  __syncthreads();
  if (threadIdx.x == 0) {
    Total all;
    for (int w = 0; w < bce_threads / warp; w++) all.add(of_warp[w]);
    Sums value = all.value();
    for (int i = 0; i < 2; i++) stats[i * 2 + blockIdx.x] = half.n ? value.of[i] / n : 0.f;
  }
}

}  // namespace

int gan_bce(Element element, BceHalf real, BceHalf fake, float* stats, void* stream) {
  return by_element(element, [&]<class T>() {
    return FASTGAN_LAUNCH((bce<T>), 2, bce_threads, 0, stream, real, fake, stats);
  });
}

}  // namespace fastgan::cuda
