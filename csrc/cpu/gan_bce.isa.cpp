// One pass over the logits of each half, in doubles: the exponential and the logarithm need no care for the last digits then.
#if !defined(__AVX512F__)  // the AVX2 copy serves; see isa.h
#include "cpu/gan_bce.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

using Double = Vec<double>;
typedef int64_t Long __attribute__((vector_size(vector_bytes)));

FASTGAN_INLINE Double bits(Long v) { return std::bit_cast<Double>(v); }
FASTGAN_INLINE Long bits(Double v) { return std::bit_cast<Long>(v); }

constexpr double factorial(int k) { return k == 0 ? 1 : k * factorial(k - 1); }

// exp(-a) for a >= 0, relative error under 1e-15 (under 1e-10 with fewer terms); 3e-308 where it would be less.
template <int terms>
FASTGAN_INLINE Double exp_minus(Double a) {
  constexpr double log2e = 1.4426950408889634, ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
  constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  a = a > splat(708.0) ? splat(708.0) : a;  // NaN stays
  Double shifted = fma(a, splat(-log2e), splat(rounder)), n = shifted - rounder;
  Double r = fma(n, splat(-ln2_low), fma(n, splat(-ln2_high), -a));
  Double sum{};
  FASTGAN_UNROLL for (int k = terms; k >= 0; k--) sum = fma(sum, r, splat(1 / factorial(k)));
  return sum * bits(((bits(shifted) - bits(splat(rounder))) + 1023) << 52);
}

// log(1 + e) for e in [0, 1], by 2*atanh(e / (2 + e)); relative error 9^-terms.
template <int terms>
FASTGAN_INLINE Double log_one_plus(Double e) {
  Double s = e / (e + 2.0), square = s * s, sum = splat(1.0 / (2 * terms + 1));
  FASTGAN_UNROLL for (int k = terms - 1; k >= 0; k--) sum = fma(sum, square, splat(1.0 / (2 * k + 1)));
  return 2.0 * s * sum;
}

template <class S>
FASTGAN_INLINE double widened(S x) {
  return x;
}
struct bfloat16 {
  uint16_t bits;
};
FASTGAN_INLINE double widened(bfloat16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Adds the losses and the sigmoids of n logits to sums[0] and sums[1].
template <class S, class T>
void run_task(const S* logits, int64_t n, double target, double share, double* sums, T* gradient) {
  constexpr bool exact = sizeof(T) == 8;
  constexpr int64_t piece = 64 * lanes<double>;
  alignas(vector_bytes) double values[piece], slopes[piece];
  Double losses{}, means{}, zero{};
  for (int64_t begin = 0; begin < n; begin += piece) {
    int64_t count = std::min(piece, n - begin);
    for (int64_t i = 0; i < count; i++) values[i] = widened(logits[begin + i]);
    for (int64_t i = 0; i < count; i += lanes<double>) {
      int64_t some = std::min<int64_t>(lanes<double>, count - i);
      Double x = load(values + i, some), size = x < zero ? -x : x, e = exp_minus<exact ? 13 : 9>(size);
      Double small = e / (e + 1.0);  // the sigmoid of -|x|, without cancellation
      // -log(sigmoid(x)) = max(-x, 0) + log(1 + e), -log(sigmoid(-x)) = max(x, 0) + log(1 + e)
      Double loss = log_one_plus<exact ? 14 : 9>(e), p = x < zero ? small : 1.0 - small;
      if (target != 0) loss += target * (x < zero ? size : zero);
      if (target != 1) loss += (1 - target) * (x > zero ? x : zero);
      store(slopes + i, x < zero ? small - target : (1 - target) - small);
      for (int64_t l = some; l < lanes<double>; l++) loss[l] = p[l] = 0;
      losses += loss, means += p;
    }
    for (int64_t i = 0; i < count; i++) gradient[begin + i] = static_cast<T>(slopes[i] * share);
  }
  for (int l = 0; l < lanes<double>; l++) sums[0] += losses[l], sums[1] += means[l];
}

// In tasks of fixed size, so that sums are the same for any number of threads.
template <class S, class T>
void run(const S* logits, int64_t n, double target, T* stats, T* gradient) {
  constexpr int64_t task = 1 << 13;
  int64_t tasks = (n + task - 1) / task;
  double share = 1 / static_cast<double>(n), losses = 0, means = 0;
  std::vector<double> sums(2 * tasks);
  parallel(tasks, [&](int64_t t) {
    int64_t begin = t * task;
    run_task(logits + begin, std::min(task, n - begin), target, share, sums.data() + 2 * t, gradient + begin);
  });
  for (int64_t t = 0; t < tasks; t++) losses += sums[2 * t], means += sums[2 * t + 1];
  stats[0] = static_cast<T>(losses * share), stats[2] = static_cast<T>(means * share);
}

}  // namespace

void run_gan_bce(Logits type, const void* logits, int64_t n, double target, void* stats, void* gradient) {
  auto single = [&]<class S>(const S* x) { run(x, n, target, static_cast<float*>(stats), static_cast<float*>(gradient)); };
  switch (type) {
    case Logits::float32: return single(static_cast<const float*>(logits));
    case Logits::bfloat16: return single(static_cast<const bfloat16*>(logits));
    case Logits::float64:
      return run(static_cast<const double*>(logits), n, target, static_cast<double*>(stats), static_cast<double*>(gradient));
  }
}

}  // namespace fastgan::cpu::FASTGAN_ISA
#endif
