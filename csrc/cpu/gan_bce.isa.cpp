// One pass over the logits, summed in double.
#if !defined(__AMX_BF16__)  // the AVX-512 copy serves; see isa.h
#include "cpu/gan_bce.h"

#include <algorithm>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

// What the elementary functions need to know of a type. Terms leave less than half an ulp.
template <class T>
struct Real;
template <>
struct Real<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023, exp_terms = 13, log_terms = 15;
  static constexpr double largest = 746, ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
};
template <>
struct Real<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, bias = 127, exp_terms = 7, log_terms = 6;
  static constexpr float largest = 104, ln2_high = 0.693359375, ln2_low = -2.12194440e-4;  // n * ln2_high is exact
};

constexpr double factorial(int k) { return k == 0 ? 1 : k * factorial(k - 1); }

// exp(-a) for a >= 0; beyond `largest` it is 0.
template <class T>
FASTGAN_INLINE Vec<T> exp_minus(Vec<T> a) {
  using R = Real<T>;
  typedef typename R::Bits Bits __attribute__((vector_size(vector_bytes)));
  constexpr T log2e = 1.4426950408889634;
  Vec<T> largest = splat(R::largest), rounder = splat(T(typename R::Bits(3) << (R::mantissa - 1)));
  a = a > largest ? largest : a;  // NaN stays
  // Adding 1.5 * 2^mantissa leaves the nearest integer in the low bits.
  Vec<T> shifted = fma(a, splat(-log2e), rounder), n = shifted - rounder, sum{};
  Vec<T> r = fma(n, splat(-R::ln2_low), fma(n, splat(-R::ln2_high), -a));
  FASTGAN_UNROLL for (int k = R::exp_terms; k >= 0; k--) sum = fma(sum, r, splat(T(1 / factorial(k))));
  // Casts of the compiler's: std::bit_cast is a function, which the linker would take from another instruction set.
  Bits exponent = (Bits)shifted - (Bits)rounder, half = exponent / 2;
  auto power = [](Bits of_two) __attribute__((always_inline)) { return (Vec<T>)((of_two + R::bias) << R::mantissa); };
  return sum * power(half) * power(exponent - half);  // in two steps to what is less than the least normal number
}

// log(1 + e) for e in [0, 1], by 2*atanh(e / (2 + e)).
template <class T>
FASTGAN_INLINE Vec<T> log_one_plus(Vec<T> e) {
  constexpr int terms = Real<T>::log_terms;
  Vec<T> s = e / (e + splat(T(2))), square = s * s, sum = splat(T(1.0 / (2 * terms + 1)));
  FASTGAN_UNROLL for (int k = terms - 1; k >= 0; k--) sum = fma(sum, square, splat(T(1.0 / (2 * k + 1))));
  return (s + s) * sum;
}

// Adds the losses and the sigmoids of n logits to sums[0] and sums[1]: a few of each lane in T, and these in double.
template <class S, class T>
void run_task(const S* logits, int64_t n, double target, double share, double* sums, T* gradient) {
  Vec<T> zero{}, one = splat(T(1)), real = splat(T(target)), fake = splat(T(1 - target)), scale = splat(T(share));
  Vec<T> losses{}, beliefs{};
  auto add = [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    Vec<T> x = load(logits + i, some), size = x < zero ? -x : x, e = exp_minus<T>(size);
    Vec<T> small = e / (e + one);  // the sigmoid of -|x|, without cancellation
    // -log(sigmoid(x)) = max(-x, 0) + log(1 + e), -log(sigmoid(-x)) = max(x, 0) + log(1 + e)
    Vec<T> loss = log_one_plus<T>(e), belief = x < zero ? small : one - small;
    if (target != 0) loss = fma(real, x < zero ? size : zero, loss);
    if (target != 1) loss = fma(fake, x > zero ? x : zero, loss);
    store(gradient + i, (x < zero ? small - real : fake - small) * scale, some);
    if (some < lanes<T>) {
      for (int64_t l = some; l < lanes<T>; l++) loss[l] = belief[l] = 0;
    }
    losses += loss, beliefs += belief;
  };
  for (int64_t i = 0; i < n;) {
    losses = beliefs = zero;
    int64_t end = std::min(n, i + 8 * lanes<T>);
    for (; i + lanes<T> <= end; i += lanes<T>) add(i, lanes<T>);
    if (i < end) add(i, end - i), i = end;
    for (int l = 0; l < lanes<T>; l++) sums[0] += losses[l], sums[1] += beliefs[l];
  }
}

// In tasks of fixed size, so that sums are the same for any number of threads; those of all halves side by side.
template <class S, class T>
void run(const Half* halves, int64_t count) {
  constexpr int64_t task = 1 << 13;
  struct Task {
    const Half& half;
    int64_t begin;
    double sums[2] = {};
  };
  std::vector<Task> tasks;
  for (const Half* half = halves; half < halves + count; half++) {
    for (int64_t begin = 0; begin < half->n; begin += task) tasks.push_back({*half, begin});
  }
  parallel(tasks.size(), [&](int64_t t) {
    auto& [half, begin, sums] = tasks[t];
    run_task(static_cast<const S*>(half.logits) + begin, std::min(task, half.n - begin), half.target, 1 / static_cast<double>(half.n),
             sums, static_cast<T*>(half.gradient) + begin);
  });
  auto next = tasks.begin();
  for (const Half* half = halves; half < halves + count; half++) {
    double share = 1 / static_cast<double>(half->n), losses = 0, means = 0;
    for (; next != tasks.end() && &next->half == half; next++) losses += next->sums[0], means += next->sums[1];
    T* stats = static_cast<T*>(half->stats);
    stats[0] = static_cast<T>(losses * share), stats[2] = static_cast<T>(means * share);
  }
}

}  // namespace

void run_gan_bce(Storage type, const Half* halves, int64_t count) {
  switch (type) {
    case Storage::float32: return run<float, float>(halves, count);
    case Storage::bfloat16: return run<bfloat16, float>(halves, count);
    case Storage::float64: return run<double, double>(halves, count);
  }
}

}  // namespace fastgan::cpu::FASTGAN_ISA
#endif
