#include "cuda/adam_ema.h"

#include "cuda/device.cuh"

namespace fastgan::cuda {
namespace {

constexpr int adam_threads = 256;
constexpr int most_tensors = 48;                 // in one launch: they travel as kernel arguments, 4 KB in all
constexpr int64_t per_block = adam_threads * 16;  // elements

struct AdamBatch {
  AdamTensor tensors[most_tensors];
  int first_block[most_tensors + 1];
  int count;
};
static_assert(sizeof(AdamBatch) + sizeof(AdamOptions) + sizeof(void*) < 4096);

struct AdamState {
  float param, exp_avg, exp_avg_sq, ema;
};

// The options as the elements use them: fp32, but taken from differences such as 1 - beta2^step in double.
struct AdamFactors {
  float keep, decay, fresh1, beta2, fresh2, step_size, root_correction, eps, fresh_ema;

  __device__ AdamFactors(const AdamOptions& o, double step)
      : keep(static_cast<float>(o.decoupled ? 1. - o.lr * o.weight_decay : 1.)),
        decay(static_cast<float>(o.decoupled ? 0. : o.weight_decay)),
        fresh1(static_cast<float>(1. - o.beta1)),
        beta2(static_cast<float>(o.beta2)),
        fresh2(static_cast<float>(1. - o.beta2)),
        step_size(static_cast<float>(o.lr / (1. - pow(o.beta1, step)))),
        root_correction(static_cast<float>(sqrt(1. - pow(o.beta2, step)))),
        eps(static_cast<float>(o.eps)),
        fresh_ema(static_cast<float>(1. - o.ema_decay)) {}
};

__device__ __forceinline__ void update(AdamState& s, float grad, const AdamFactors& f) {
  s.param *= f.keep;
  grad = fmaf(f.decay, s.param, grad);
  s.exp_avg = fmaf(f.fresh1, grad - s.exp_avg, s.exp_avg);
  s.exp_avg_sq = fmaf(f.beta2, s.exp_avg_sq, f.fresh2 * grad * grad);
  s.param -= f.step_size * s.exp_avg / (sqrtf(s.exp_avg_sq) / f.root_correction + f.eps);
  s.ema = fmaf(f.fresh_ema, s.param - s.ema, s.ema);
}

__global__ void __launch_bounds__(adam_threads) adam(AdamBatch batch, const float* step, AdamOptions options) {
  int t = 0;
  while (static_cast<int>(blockIdx.x) >= batch.first_block[t + 1]) t++;
  AdamTensor of = batch.tensors[t];
  int64_t begin = (blockIdx.x - batch.first_block[t]) * per_block, end = min(begin + per_block, of.n);

  AdamFactors factors(options, *step);

  auto address = [](const float* p) { return reinterpret_cast<uintptr_t>(p); };
  bool aligned = (address(of.param) | address(of.grad) | address(of.exp_avg) | address(of.exp_avg_sq) | address(of.ema)) % 16 == 0;
  constexpr int size = Vector<float>::size;
  int64_t vectors_end = aligned ? begin + (end - begin) / size * size : begin;
  for (int64_t i = begin + threadIdx.x * size; i < vectors_end; i += adam_threads * size) {
    auto param = load_vector(of.param + i), grad = load_vector(of.grad + i), exp_avg = load_vector(of.exp_avg + i);
    auto exp_avg_sq = load_vector(of.exp_avg_sq + i), ema = of.ema ? load_vector(of.ema + i) : Vector<float>{};
#pragma unroll
    for (int k = 0; k < size; k++) {
      AdamState s{param.v[k], exp_avg.v[k], exp_avg_sq.v[k], ema.v[k]};
      update(s, grad.v[k], factors);
      param.v[k] = s.param, exp_avg.v[k] = s.exp_avg, exp_avg_sq.v[k] = s.exp_avg_sq, ema.v[k] = s.ema;
    }
    store_vector(of.param + i, param);
    store_vector(of.exp_avg + i, exp_avg);
    store_vector(of.exp_avg_sq + i, exp_avg_sq);
    if (of.ema) store_vector(of.ema + i, ema);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += adam_threads) {
    AdamState s{of.param[i], of.exp_avg[i], of.exp_avg_sq[i], of.ema ? of.ema[i] : 0.f};
    update(s, of.grad[i], factors);
    of.param[i] = s.param, of.exp_avg[i] = s.exp_avg, of.exp_avg_sq[i] = s.exp_avg_sq;
    if (of.ema) of.ema[i] = s.ema;
  }
}

}  // namespace

int adam_ema(const AdamTensor* tensors, int count, const float* step, AdamOptions options, void* stream) {
  for (int first = 0; first < count; first += most_tensors) {
    AdamBatch batch{};
    batch.count = min(count - first, most_tensors);
    for (int t = 0; t < batch.count; t++) {
      batch.tensors[t] = tensors[first + t];
      batch.first_block[t + 1] = batch.first_block[t] + divide_up(batch.tensors[t].n, per_block);
    }
    int blocks = batch.first_block[batch.count];
    if (blocks == 0) continue;
    if (int error = FASTGAN_LAUNCH(adam, blocks, adam_threads, 0, stream, batch, step, options)) return error;
  }
  return 0;
}

}  // namespace fastgan::cuda
