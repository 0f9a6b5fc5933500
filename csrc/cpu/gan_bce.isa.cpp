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
  typedef double Doubles __attribute__((vector_size(vector_bytes)));  // as many as lanes
  static constexpr int mantissa = 52, bias = 1023, exp_terms = 13, log_terms = 15;
  static constexpr double largest = 746, ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
};
template <>
struct Real<float> {
  using Bits = int32_t;
  typedef double Doubles __attribute__((vector_size(2 * vector_bytes)));
  static constexpr int mantissa = 23, bias = 127, exp_terms = 7, log_terms = 6;
  static constexpr float largest = 104, ln2_high = 0.693359375, ln2_low = -2.12194440e-4;  // n * ln2_high is exact
};

constexpr double factorial(int k) { return k == 0 ? 1 : k * factorial(k - 1); }

// So many registers abreast: each is a long chain of dependent steps, of which a processor keeps two in view.
constexpr int abreast = vector_bytes == 64 ? 4 : 2;
template <class T>
using Vecs = Vec<T>[abreast];
#define FASTGAN_EACH FASTGAN_UNROLL for (int i = 0; i < abreast; i++)

// exp(-a) for a >= 0; beyond `largest` it is 0.
template <class T>
FASTGAN_INLINE void exp_minus(const Vecs<T>& a, Vecs<T>& result) {
  using R = Real<T>;
  typedef typename R::Bits Bits __attribute__((vector_size(vector_bytes)));
  constexpr T log2e = 1.4426950408889634;
  Vec<T> largest = splat(R::largest), rounder = splat(T(typename R::Bits(3) << (R::mantissa - 1)));
  Vecs<T> limited, shifted, n, r, sum;
  FASTGAN_EACH limited[i] = a[i] > largest ? largest : a[i];  // NaN stays
  // Adding 1.5 * 2^mantissa leaves the nearest integer in the low bits.
  FASTGAN_EACH shifted[i] = fma(limited[i], splat(-log2e), rounder);
  FASTGAN_EACH n[i] = shifted[i] - rounder;
  FASTGAN_EACH r[i] = fma(n[i], splat(-R::ln2_high), -limited[i]);
  FASTGAN_EACH r[i] = fma(n[i], splat(-R::ln2_low), r[i]);
  FASTGAN_EACH sum[i] = splat(T(1 / factorial(R::exp_terms)));
  FASTGAN_UNROLL for (int k = R::exp_terms - 1; k >= 0; k--) {
    FASTGAN_EACH sum[i] = fma(sum[i], r[i], splat(T(1 / factorial(k))));
  }
  // Casts of the compiler's: std::bit_cast is a function, which the linker would take from another instruction set.
  auto power = [](Bits of_two) __attribute__((always_inline)) { return (Vec<T>)((of_two + R::bias) << R::mantissa); };
  FASTGAN_EACH {  // in two steps to what is less than the least normal number
    Bits exponent = (Bits)shifted[i] - (Bits)rounder, half = exponent >> 1;
    result[i] = sum[i] * power(half) * power(exponent - half);
  }
}

// log(1 + e) for e in [0, 1], by 2*atanh(e / (2 + e)).
template <class T>
FASTGAN_INLINE void log_one_plus(const Vecs<T>& e, Vecs<T>& result) {
  constexpr int terms = Real<T>::log_terms;
  Vecs<T> s, square, sum;
  FASTGAN_EACH s[i] = e[i] / (e[i] + splat(T(2)));
  FASTGAN_EACH square[i] = s[i] * s[i];
  FASTGAN_EACH sum[i] = splat(T(1.0 / (2 * terms + 1)));
  FASTGAN_UNROLL for (int k = terms - 1; k >= 0; k--) {
    FASTGAN_EACH sum[i] = fma(sum[i], square[i], splat(T(1.0 / (2 * k + 1))));
  }
  FASTGAN_EACH result[i] = (s[i] + s[i]) * sum[i];
}

// Adds the losses and the sigmoids of n logits to sums[0] and sums[1]: a few of each lane in T, these in double, then the lanes.
template <class S, class T>
void run_task(const S* logits, int64_t n, double target, double share, double* sums, T* gradient) {
  Vec<T> zero{}, one = splat(T(1)), real = splat(T(target)), fake = splat(T(1 - target)), scale = splat(T(share));
  using Doubles = typename Real<T>::Doubles;
  Doubles lane_losses{}, lane_beliefs{};
  constexpr int64_t at_once = abreast * lanes<T>;
  auto add = [&](const S* in, T* out, int64_t some) __attribute__((always_inline)) {
    Vecs<T> x, size, e, small, loss, belief;
    FASTGAN_EACH x[i] = load(in + i * lanes<T>);
    FASTGAN_EACH size[i] = x[i] < zero ? -x[i] : x[i];
    exp_minus<T>(size, e);
    FASTGAN_EACH small[i] = e[i] / (e[i] + one);  // the sigmoid of -|x|, without cancellation
    // -log(sigmoid(x)) = max(-x, 0) + log(1 + e), -log(sigmoid(-x)) = max(x, 0) + log(1 + e)
    log_one_plus<T>(e, loss);
    FASTGAN_EACH {
      belief[i] = x[i] < zero ? small[i] : one - small[i];
      if (target != 0) loss[i] = fma(real, x[i] < zero ? size[i] : zero, loss[i]);
      if (target != 1) loss[i] = fma(fake, x[i] > zero ? x[i] : zero, loss[i]);
      store(out + i * lanes<T>, (x[i] < zero ? small[i] - real : fake - small[i]) * scale);
    }
    for (int64_t l = some; l < at_once; l++) loss[l / lanes<T>][l % lanes<T>] = belief[l / lanes<T>][l % lanes<T>] = 0;
    Vec<T> losses{}, beliefs{};
    FASTGAN_EACH losses += loss[i], beliefs += belief[i];
    lane_losses += __builtin_convertvector(losses, Doubles), lane_beliefs += __builtin_convertvector(beliefs, Doubles);
  };
  int64_t whole = n / at_once * at_once;
  for (int64_t i = 0; i < whole; i += at_once) add(logits + i, gradient + i, at_once);
  if (whole < n) {
    S last[at_once] = {};
    T last_gradient[at_once];
    std::copy(logits + whole, logits + n, last);
    add(last, last_gradient, n - whole);
    std::copy_n(last_gradient, n - whole, gradient + whole);
  }
  for (int l = 0; l < lanes<T>; l++) sums[0] += lane_losses[l], sums[1] += lane_beliefs[l];
}
#undef FASTGAN_EACH

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
