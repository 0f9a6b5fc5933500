// One pass over half of the logits, in doubles: the exponential and the logarithm need no care for the last digits then.
#if !defined(__AVX512F__)  // no AVX-512 copy until a machine has run it
#include "cpu/gan_bce.h"

#include <algorithm>

#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

using Double = Vec<double>;
typedef int64_t Long __attribute__((vector_size(vector_bytes)));

FASTGAN_INLINE Double bits(Long v) { return reinterpret_cast<Double&>(v); }
FASTGAN_INLINE Long bits(Double v) { return reinterpret_cast<Long&>(v); }

// exp(-a) for a >= 0, relative error under 1e-15 (under 1e-10 with fewer terms); 3e-308 where it would be less.
template <int terms>
FASTGAN_INLINE Double exp_minus(Double a) {
  constexpr double log2e = 1.4426950408889634, ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
  constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  a = a > splat(708.0) ? splat(708.0) : a;  // NaN stays
  Double shifted = fma(a, splat(-log2e), splat(rounder)), n = shifted - rounder;
  Double r = fma(n, splat(-ln2_low), fma(n, splat(-ln2_high), -a));
  Double sum = splat(1.0);
  FASTGAN_UNROLL for (int k = terms; k > 0; k--) sum = fma(sum * r, splat(1.0 / k), splat(1.0));
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

template <class S, class T>
void run(const S* logits, int64_t n, double target, T* stats, T* gradient) {
  constexpr bool exact = sizeof(T) == 8;
  Double loss{}, mean{}, zero{};
  double share = 1 / static_cast<double>(n);
  for (int64_t i = 0; i < n; i += lanes<double>) {
    int64_t some = std::min<int64_t>(lanes<double>, n - i);
    Double x{};
    for (int64_t l = 0; l < some; l++) x[l] = widened(logits[i + l]);
    Double size = x < zero ? -x : x, e = exp_minus<exact ? 13 : 9>(size);
    Double small = e / (e + 1.0);  // the sigmoid of -|x|, without cancellation
    // -log(sigmoid(x)) = max(-x, 0) + log(1 + e), -log(sigmoid(-x)) = max(x, 0) + log(1 + e)
    Double tail = log_one_plus<exact ? 14 : 9>(e), up = x > zero ? x : zero, down = x < zero ? size : zero;
    Double both = tail;
    if (target != 0) both += target * down;
    if (target != 1) both += (1 - target) * up;
    Double p = x < zero ? small : 1.0 - small, g = x < zero ? small - target : (1 - target) - small;
    for (int64_t l = some; l < lanes<double>; l++) both[l] = p[l] = 0;
    loss += both, mean += p;
    for (int64_t l = 0; l < some; l++) gradient[i + l] = static_cast<T>(g[l] * share);
  }
  double losses = 0, means = 0;
  for (int l = 0; l < lanes<double>; l++) losses += loss[l], means += mean[l];
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
