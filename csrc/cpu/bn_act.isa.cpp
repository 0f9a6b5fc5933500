// bn_act's four passes: one read (two for gradients) and at most one write per element, in tasks of fixed size, so that
// sums are the same for any number of threads.
#if !defined(__AMX_BF16__)  // the AVX-512 copy serves; see isa.h
#include "cpu/bn_act.h"

#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/block.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

// Storage to compute type and back, in place where they are the same.
template <class T>
const T* converted(const T* in, int64_t, Scratch) {
  return in;
}
const float* converted(const bfloat16* in, int64_t n, Scratch use) {
  float* out = scratch<float>(use, n);
  for (int64_t i = 0; i < n; i += lanes<float>) store(out + i, load(in + i, n - i), n - i);
  return out;
}
template <class T>
T* staging(T* out, int64_t, Scratch) {
  return out;
}
float* staging(bfloat16*, int64_t n, Scratch use) { return scratch<float>(use, n); }
template <class T>
void narrow(const T*, T*, int64_t) {}
void narrow(const float* in, bfloat16* out, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<float>) store(out + i, load(in + i, n - i), n - i);
}

// Sums are kept in double, as PyTorch keeps them: a plain sum of fp32 is some times as wrong.
template <class T>
struct Wide {
  static constexpr int parts = sizeof(double) / sizeof(T);
  Vec<double> part[parts];
};

FASTGAN_INLINE Wide<double> widened(Vec<double> x) { return {{x}}; }
FASTGAN_INLINE Wide<float> widened(Vec<float> x) {
#if defined(__AVX512F__)  // spelt out: compilers take the halves through memory
  return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(Vec<double>(x), 1)))}};
#elif defined(__AVX2__)
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}};
#else
  return {{Vec<double>{x[0], x[1], x[2], x[3]}, Vec<double>{x[4], x[5], x[6], x[7]}}};
#endif
}

template <class T>
struct TwoSums {
  static constexpr int64_t terms = 256;  // as many as are walked at all
  Wide<T> first, second;

  FASTGAN_INLINE void add(const TwoSums& other) {
    for (int k = 0; k < Wide<T>::parts; k++) first.part[k] += other.first.part[k], second.part[k] += other.second.part[k];
  }
  FASTGAN_INLINE const TwoSums& wide() const { return *this; }
};

// Of a few terms, in T: their rounding does not show beside that of a gradient (it would in a variance).
template <class T>
struct ShortSums {
  static constexpr int64_t terms = 8;
  Vec<T> first, second;

  FASTGAN_INLINE TwoSums<T> wide() const { return {widened(first), widened(second)}; }
};

enum BackwardRow { row_backward_a = activation_rows, row_backward_b, row_backward_c };

// A block of `rows` x `width` values. Channels-last: width = C, a column is a channel. Contiguous: one row, one channel.
template <class T, bool channels_last>
struct Block {
  const T* constants;
  int64_t C, channel, rows, width;

  FASTGAN_INLINE Vec<T> constant(int row, int64_t i, int64_t n) const {
    if constexpr (channels_last) return load(constants + row * C + i, n);
    return splat(constants[row * C + channel]);
  }

  // f(i, n) returns what is done to the n values of columns i..., given their offset: where rows are short, constants are
  // loaded once for four; where they are long, four at a time would be more streams than the processor foresees.
  template <class F>
  FASTGAN_INLINE void each(F f) const {
    width < 64 ? each_of<4>(f) : each_of<1>(f);
  }

  template <int count, class F>
  FASTGAN_INLINE void each_of(F f) const {
    for (int64_t r = 0; r < rows; r += count) {
      int64_t some = std::min<int64_t>(count, rows - r), i = 0;
      for (; i + lanes<T> <= width; i += lanes<T>) {
        auto one = f(i, lanes<T>);
        if (some == count) {
          FASTGAN_UNROLL for (int k = 0; k < count; k++) one((r + k) * width + i);
        } else {
          for (int64_t k = 0; k < some; k++) one((r + k) * width + i);
        }
      }
      if (i == width) continue;
      auto rest = f(i, width - i);
      for (int64_t k = 0; k < some; k++) rest((r + k) * width + i);
    }
  }

  // Slope 0 maps -inf to 0, not to NaN; NaN passes through.
  template <bool relu>
  void apply(const T* y, T* z, T slope) const {
    Vec<T> slopes = splat(slope);
    each([&](int64_t i, int64_t n) __attribute__((always_inline)) {
      Vec<T> mean = constant(row_mean, i, n), scale = constant(row_scale, i, n), shift = constant(row_shift, i, n);
      return [=](int64_t at) __attribute__((always_inline)) {
        Vec<T> v = normalised<T>(load(y + at, n), mean, scale, shift);
        store(z + at, relu ? (v <= Vec<T>{} ? Vec<T>{} : v) : (v > Vec<T>{} ? v : v * slopes), n);
      };
    });
  }

  // Frozen: the statistics do not depend on y, and 0 times its infinity must not reach the gradient.
  template <bool frozen>
  void backward(const T* dz, const T* y, T* dy, T slope) const {
    Vec<T> slopes = splat(slope);
    each([&](int64_t i, int64_t n) __attribute__((always_inline)) {
      Vec<T> mean = constant(row_mean, i, n), scale = constant(row_scale, i, n), shift = constant(row_shift, i, n);
      Vec<T> a = constant(row_backward_a, i, n), b = constant(row_backward_b, i, n), c = constant(row_backward_c, i, n);
      return [=](int64_t at) __attribute__((always_inline)) {
        Vec<T> deviation = load(y + at, n) - mean, g = load(dz + at, n);
        g = activated_gradient<T>(g, fma(deviation, scale, shift), slopes);
        store(dy + at, frozen ? a * g : fma(a, g, fma(b, deviation, c)), n);
      };
    });
  }

  // Rows are walked side by side, more streams than the processor foresees: what the next ones need is asked for here.
  template <class Some>
  FASTGAN_INLINE void fetch_next(const T* values, int64_t at) const {
    __builtin_prefetch(values + at + std::min(Some::terms, rows) * width);
  }

  // Adds to two sums of each channel, in out[channel] and out[C + channel]: f(at, i, n, sums) adds one register of values.
  template <class Some, class F>
  FASTGAN_INLINE void sum(double* out, F f) const {
    if constexpr (channels_last) {
      for (int64_t r = 0; r < rows; r += Some::terms) {
        int64_t i = 0;
        for (; i + 2 * lanes<T> <= width; i += 2 * lanes<T>) sum_rows<Some, 2>(out, i, lanes<T>, r, f);  // a whole cache line, or two
        for (; i < width; i += lanes<T>) sum_rows<Some, 1>(out, i, std::min<int64_t>(lanes<T>, width - i), r, f);
      }
    } else {
      TwoSums<T> all{};
      for (int64_t i = 0; i < width;) {
        Some some{};
        for (int64_t end = std::min(width, i + Some::terms * lanes<T>); i < end; i += lanes<T>) {
          f(i, i, std::min<int64_t>(lanes<T>, width - i), some);
        }
        all.add(some.wide());
      }
      for (int k = 1; k < Wide<T>::parts; k++) all.first.part[0] += all.first.part[k], all.second.part[0] += all.second.part[k];
      for (int l = 0; l < lanes<double>; l++) out[channel] += all.first.part[0][l], out[C + channel] += all.second.part[0][l];
    }
  }

  // Of rows r and after, and of `registers` registers of columns from i on, n in each.
  template <class Some, int registers, class F>
  FASTGAN_INLINE void sum_rows(double* out, int64_t i, int64_t n, int64_t r, F f) const {
    Some some[registers] = {};
    for (int64_t end = std::min(rows, r + Some::terms); r < end; r++) {
      FASTGAN_UNROLL for (int c = 0; c < registers; c++) f(r * width + i + c * lanes<T>, i + c * lanes<T>, n, some[c]);
    }
    FASTGAN_UNROLL for (int c = 0; c < registers; c++) {
      TwoSums<T> all = some[c].wide();
      FASTGAN_UNROLL for (int k = 0; k < Wide<T>::parts; k++) {
        double* at = out + i + c * lanes<T> + k * lanes<double>;
        int64_t left = std::clamp<int64_t>(n - k * lanes<double>, 0, lanes<double>);
        store(at, load(at, left) + all.first.part[k], left), store(at + C, load(at + C, left) + all.second.part[k], left);
      }
    }
  }

  // Sums of the differences from `pivot`, a value of the channel, and of their squares: they lose no digits, whatever the
  // mean is.
  void statistics(const T* y, const T* pivot, double* out) const {
    sum<TwoSums<T>>(out, [&](int64_t at, int64_t i, int64_t n, TwoSums<T>& s) __attribute__((always_inline)) {
      fetch_next<TwoSums<T>>(y, at);
      Vec<T> from = channels_last ? load(pivot + i, n) : splat(pivot[channel]);
      Wide<T> d = widened(load(y + at, n)), centre = widened(from);
      for (int k = 0; k < Wide<T>::parts; k++) {
        d.part[k] -= centre.part[k];
        if (!channels_last) {  // channels-last, the lanes past n are of no channel
          for (int64_t l = std::max<int64_t>(0, n - k * lanes<double>); l < lanes<double>; l++) d.part[k][l] = 0;
        }
        s.first.part[k] += d.part[k], s.second.part[k] = fma(d.part[k], d.part[k], s.second.part[k]);
      }
    });
  }

  void reduce(const T* dz, const T* y, double* out, T slope) const {
    Vec<T> slopes = splat(slope);
    sum<ShortSums<T>>(out, [&](int64_t at, int64_t i, int64_t n, ShortSums<T>& s) __attribute__((always_inline)) {
      fetch_next<ShortSums<T>>(y, at), fetch_next<ShortSums<T>>(dz, at);
      Vec<T> deviation = load(y + at, n) - constant(row_mean, i, n), g = load(dz + at, n);
      g = activated_gradient<T>(g, fma(deviation, constant(row_scale, i, n), constant(row_shift, i, n)), slopes);
      s.first += g, s.second = fma(g, deviation, s.second);
    });
  }
};

// One task: `count` pixels (of one channel where the layout is contiguous), a piece of the first-level cache at a time.
template <class S, class T, bool channels_last>
void run_task(const BnAct& p, int64_t image, int64_t channel, int64_t begin, int64_t count, bool frozen,
              double* sums) {
  constexpr int64_t piece = 16384 / sizeof(T);
  int64_t step = channels_last ? std::clamp<int64_t>(piece / p.C, 4, 256) : piece, row = channels_last ? p.C : 1;
  int64_t first = channels_last ? begin * p.C : (image * p.C + channel) * p.S + begin;
  T slope = static_cast<T>(p.slope);
  auto y = static_cast<const S*>(p.y) + first, dz = p.dz ? static_cast<const S*>(p.dz) + first : nullptr;
  const T* pivot = nullptr;
  if (p.step == BnActStep::statistics) {
    T* values = scratch<T>(Scratch::sums, p.C);
    std::copy_n(converted(y, row, Scratch::large), row, values + channel);
    pivot = values;
  }
  for (int64_t done = 0; done < count; done += step) {
    int64_t pixels = std::min(step, count - done), at = done * row, n = pixels * row;
    Block<T, channels_last> b{static_cast<const T*>(p.constants), p.C, channel, channels_last ? pixels : 1,
                              channels_last ? p.C : pixels};
    const T* values = converted(y + at, n, Scratch::large);
    const T* gradients = dz ? converted(dz + at, n, Scratch::small) : nullptr;
    if (p.step == BnActStep::statistics) {
      b.statistics(values, pivot, sums);
    } else if (p.step == BnActStep::reduce) {
      b.reduce(gradients, values, sums, slope);
    } else {
      S* out = static_cast<S*>(p.out) + first + at;
      T* result = staging(out, n, Scratch::image);
      if (p.step == BnActStep::backward && frozen) b.template backward<true>(gradients, values, result, slope);
      else if (p.step == BnActStep::backward) b.template backward<false>(gradients, values, result, slope);
      else if (p.slope == 0) b.template apply<true>(values, result, slope);
      else b.template apply<false>(values, result, slope);
      narrow(result, out, n);
    }
  }
  if (p.step != BnActStep::statistics) return;
  int64_t last = channels_last ? p.C : channel + 1;
  for (int64_t c = channels_last ? 0 : channel; c < last; c++) {
    double offset = sums[c] / static_cast<double>(count);
    sums[p.C + c] -= sums[c] * offset;
    sums[c] = static_cast<double>(pivot[c]) + offset;
  }
}

template <class S, class T, bool channels_last>
void run(const BnAct& p) {
  constexpr int64_t task_values = 1 << 14;
  int64_t unit = channels_last ? p.N * p.S : p.S;  // pixels to cut: of everything, or of one channel of one image
  int64_t pixels = channels_last ? std::max<int64_t>(task_values / p.C, 16) : task_values;
  int64_t cuts = (unit + pixels - 1) / pixels, blocks = channels_last ? cuts : p.N * cuts;
  bool sums = p.step == BnActStep::statistics || p.step == BnActStep::reduce;
  bool frozen = false;
  if (p.step == BnActStep::backward) {
    auto rows = static_cast<const T*>(p.constants) + row_backward_b * p.C;
    frozen = std::all_of(rows, rows + 2 * p.C, [](T x) { return x == 0; });
  }
  double* partial = sums ? scratch<double>(Scratch::partial, blocks * 2 * p.C) : nullptr;
  // A task is one cut or, where planes are small, some whole ones.
  int64_t all = channels_last ? cuts : p.N * p.C * cuts, together = cuts == 1 ? std::max<int64_t>(1, task_values / unit) : 1;
  parallel((all + together - 1) / together, [&](int64_t task) {
    for (int64_t i = task * together; i < std::min((task + 1) * together, all); i++) {
      int64_t cut = i % cuts, plane = i / cuts, image = channels_last ? 0 : plane / p.C;
      int64_t channel = channels_last ? 0 : plane % p.C, row = channels_last ? p.C : 1;
      double* own = sums ? partial + (image * cuts + cut) * 2 * p.C : nullptr;
      if (sums) std::fill_n(own + channel, row, 0.0), std::fill_n(own + p.C + channel, row, 0.0);
      run_task<S, T, channels_last>(p, image, channel, cut * pixels, std::min(pixels, unit - cut * pixels), frozen, own);
    }
  });
  if (sums) {
    std::vector<double> result(2 * p.C);
    auto count_of = [&](int64_t b) { return std::min(pixels, unit - b % cuts * pixels); };
    combine_blocks(p.step == BnActStep::statistics ? Finish::statistics : Finish::backward, partial, blocks, count_of, p.C,
                   result.data());
    std::copy(result.begin(), result.end(), static_cast<T*>(p.out));
  }
}

}  // namespace

void run_bn_act(const BnAct& p) {
  switch (p.storage) {
    case Storage::float32:
      return p.channels_last ? run<float, float, true>(p) : run<float, float, false>(p);
    case Storage::float64:
      return p.channels_last ? run<double, double, true>(p) : run<double, double, false>(p);
    case Storage::bfloat16:
      return p.channels_last ? run<bfloat16, float, true>(p) : run<bfloat16, float, false>(p);
  }
}

}  // namespace fastgan::cpu::FASTGAN_ISA
#endif
