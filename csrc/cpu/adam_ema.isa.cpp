// Adam or AdamW and the EMA of the result: five reads and four writes per element, all tensors in one parallel loop.
#if !defined(__AVX512F__)  // the AVX2 copy serves; see isa.h
#include "cpu/adam_ema.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t chunk = 16384;  // elements of one task: five streams of 64 KB

template <class T>
FASTGAN_INLINE Vec<T> root(Vec<T> v) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_sqrt_ps(v);
  else return _mm256_sqrt_pd(v);
#else
  for (int l = 0; l < lanes<T>; l++) v[l] = std::sqrt(v[l]);
  return v;
#endif
}

template <class T>
FASTGAN_INLINE void update(const AdamTensor<T>& of, int64_t i, int64_t n, const AdamFactors<T>& f) {
  Vec<T> param = load(of.param + i, n) * f.keep, grad = fma(splat(f.decay), param, load(of.grad + i, n));
  Vec<T> mean = load(of.exp_avg + i, n), square = load(of.exp_avg_sq + i, n);
  mean = fma(splat(f.fresh1), grad - mean, mean);
  square = fma(splat(f.beta2), square, f.fresh2 * grad * grad);
  param -= f.step_size * mean / (root<T>(square) / f.root_correction + f.eps);
  store(of.param + i, param, n), store(of.exp_avg + i, mean, n), store(of.exp_avg_sq + i, square, n);
  if (of.ema == nullptr) return;
  Vec<T> ema = load(of.ema + i, n);
  store(of.ema + i, fma(splat(f.fresh_ema), param - ema, ema), n);
}

template <class T>
void run(const std::vector<AdamTensor<T>>& tensors, const AdamFactors<T>& factors) {
  std::vector<int64_t> first_task{0};
  for (const auto& t : tensors) first_task.push_back(first_task.back() + (t.n + chunk - 1) / chunk);
  parallel(first_task.back(), [&](int64_t task) {
    auto which = std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin() - 1;
    const AdamTensor<T>& of = tensors[which];
    int64_t i = (task - first_task[which]) * chunk, end = std::min(i + chunk, of.n);
    for (; i + lanes<T> <= end; i += lanes<T>) update(of, i, lanes<T>, factors);
    if (i < end) update(of, i, end - i, factors);
  });
}

}  // namespace

void run_adam_ema(const std::vector<AdamTensor<float>>& tensors, const AdamFactors<float>& factors) { run(tensors, factors); }
void run_adam_ema(const std::vector<AdamTensor<double>>& tensors, const AdamFactors<double>& factors) { run(tensors, factors); }

}  // namespace fastgan::cpu::FASTGAN_ISA
#endif
