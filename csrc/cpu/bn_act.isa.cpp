// bn_act's four passes: one read (two for gradients) and at most one write per element, in blocks of fixed size, so that
// sums are the same for any number of threads.
#if !defined(__AVX512F__)  // no AVX-512 copy until a machine has run it
#include "cpu/bn_act.h"
#include "cpu/block.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};

// Storage to compute type and back, in place where they are the same.
template <class T>
const T* widened(const T* in, int64_t, Scratch) {
  return in;
}
const float* widened(const bfloat16* in, int64_t n, Scratch use) {
  float* out = scratch<float>(use, n);
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = static_cast<uint32_t>(in[i].bits) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
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
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, in + i, sizeof bits);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    out[i].bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
  }
}

// A sum that keeps what rounding takes from it (Knuth's two-sum): PyTorch adds a channel's values in double, and a plain
// sum of fp32 is some times as wrong.
template <class T>
struct Sum {
  Vec<T> value{}, lost{};

  FASTGAN_INLINE void add(Vec<T> x) {
    Vec<T> sum = value + x, part = sum - value;
    lost += (value - (sum - part)) + (x - part);
    value = sum;
  }
  FASTGAN_INLINE void add_product(Vec<T> a, Vec<T> b) {
    Vec<T> product = a * b;
    lost += fma(a, b, -product);
    add(product);
  }
  FASTGAN_INLINE Vec<T> total() const { return value + lost; }
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

  FASTGAN_INLINE Vec<T> gradient(Vec<T> dz, Vec<T> y, int64_t i, int64_t n, Vec<T> slope) const {
    Vec<T> v = normalised<T>(y, constant(row_mean, i, n), constant(row_scale, i, n), constant(row_shift, i, n));
    return v > Vec<T>{} ? dz : dz * slope;
  }

  template <class F>
  FASTGAN_INLINE void each(F f) const {
    for (int64_t r = 0; r < rows; r++) {
      int64_t i = 0;
      for (; i + lanes<T> <= width; i += lanes<T>) f(r * width + i, i, lanes<T>);
      if (i < width) f(r * width + i, i, width - i);
    }
  }

  void apply(const T* y, T* z, T slope) const {
    Vec<T> slopes = splat(slope);
    each([&](int64_t at, int64_t i, int64_t n) __attribute__((always_inline)) {
      Vec<T> v = normalised<T>(load(y + at, n), constant(row_mean, i, n), constant(row_scale, i, n), constant(row_shift, i, n));
      store(z + at, activated<T>(v, slopes), n);
    });
  }

  void backward(const T* dz, const T* y, T* dy, T slope) const {
    Vec<T> slopes = splat(slope);
    each([&](int64_t at, int64_t i, int64_t n) __attribute__((always_inline)) {
      Vec<T> raw = load(y + at, n), g = gradient(load(dz + at, n), raw, i, n, slopes);
      Vec<T> rest = fma(constant(row_backward_b, i, n), raw - constant(row_mean, i, n), constant(row_backward_c, i, n));
      store(dy + at, fma(constant(row_backward_a, i, n), g, rest), n);
    });
  }

  // Two sums over the block into out[channel], out[C + channel]: f(at, i, n, first, second) adds one register of values.
  template <class F>
  FASTGAN_INLINE void sum(T* out, F f) const {
    if constexpr (channels_last) {
      for (int64_t i = 0; i < width; i += lanes<T>) {
        int64_t n = std::min<int64_t>(lanes<T>, width - i);
        Sum<T> first, second;
        for (int64_t r = 0; r < rows; r++) f(r * width + i, i, n, first, second);
        store(out + i, first.total(), n), store(out + C + i, second.total(), n);
      }
    } else {
      Sum<T> first, second;
      for (int64_t i = 0; i < width; i += lanes<T>) f(i, i, std::min<int64_t>(lanes<T>, width - i), first, second);
      double a = 0, b = 0;
      for (int l = 0; l < lanes<T>; l++) {
        a += static_cast<double>(first.value[l]) + first.lost[l], b += static_cast<double>(second.value[l]) + second.lost[l];
      }
      out[channel] = static_cast<T>(a), out[C + channel] = static_cast<T>(b);
    }
  }

  void statistics(const T* y, T* out) const {
    T count = static_cast<T>(channels_last ? rows : width);
    // A first pass for the mean, nearly: sums of differences from it lose no digits, whatever it is.
    sum(out, [&](int64_t at, int64_t, int64_t n, Sum<T>& first, Sum<T>&) __attribute__((always_inline)) {
      first.value += load(y + at, n);
    });
    int64_t begin = channels_last ? 0 : channel, end = channels_last ? width : channel + 1;
    T* means = scratch<T>(Scratch::sums, C);
    for (int64_t c = begin; c < end; c++) means[c] = out[c] / count;
    sum(out, [&](int64_t at, int64_t i, int64_t n, Sum<T>& first, Sum<T>& second) __attribute__((always_inline)) {
      Vec<T> d = load(y + at, n) - (channels_last ? load(means + i, n) : splat(means[channel]));
      if (!channels_last) {
        for (int64_t l = n; l < lanes<T>; l++) d[l] = 0;
      }
      first.add(d), second.add_product(d, d);
    });
    for (int64_t c = begin; c < end; c++) {
      T offset = out[c] / count;
      out[C + c] -= out[c] * offset;
      out[c] = means[c] + offset;
    }
  }

  void reduce(const T* dz, const T* y, T* out, T slope) const {
    Vec<T> slopes = splat(slope);
    sum(out, [&](int64_t at, int64_t i, int64_t n, Sum<T>& first, Sum<T>& second) __attribute__((always_inline)) {
      Vec<T> raw = load(y + at, n), g = gradient(load(dz + at, n), raw, i, n, slopes);
      first.add(g), second.add_product(g, raw - constant(row_mean, i, n));
    });
  }
};

template <class S, class T, bool channels_last>
void run(const BnAct& p) {
  auto y = static_cast<const S*>(p.y), dz = static_cast<const S*>(p.dz);
  T slope = static_cast<T>(p.slope);
  // About 16 KB per block, so that the later lane groups of a row find it in the first-level cache.
  constexpr int64_t block = 16384 / sizeof(T);
  int64_t unit = channels_last ? p.N * p.S : p.S;  // pixels to cut: of everything, or of one channel of one image
  int64_t pixels = channels_last ? std::clamp<int64_t>(block / p.C, 16, 256) : block, cuts = (unit + pixels - 1) / pixels;
  bool sums = p.step == BnActStep::statistics || p.step == BnActStep::reduce;
  int64_t blocks = channels_last ? cuts : p.N * cuts;
  T* partial = sums ? scratch<T>(Scratch::partial, blocks * 2 * p.C) : nullptr;
  parallel(channels_last ? cuts : p.N * p.C * cuts, [&](int64_t task) {
    int64_t cut = task % cuts, plane = task / cuts, count = std::min(pixels, unit - cut * pixels);
    int64_t channel = channels_last ? 0 : plane % p.C, image = channels_last ? 0 : plane / p.C;
    int64_t at = channels_last ? cut * pixels * p.C : plane * p.S + cut * pixels, n = channels_last ? count * p.C : count;
    Block<T, channels_last> b{static_cast<const T*>(p.constants), p.C, channel, channels_last ? count : 1,
                              channels_last ? p.C : count};
    const T* values = widened(y + at, n, Scratch::large);
    const T* gradients = dz ? widened(dz + at, n, Scratch::small) : nullptr;
    if (sums) {
      T* to = partial + (image * cuts + cut) * 2 * p.C;
      p.step == BnActStep::statistics ? b.statistics(values, to) : b.reduce(gradients, values, to, slope);
    } else {
      S* out = static_cast<S*>(p.out) + at;
      T* result = staging(out, n, Scratch::image);
      p.step == BnActStep::apply ? b.apply(values, result, slope) : b.backward(gradients, values, result, slope);
      narrow(result, out, n);
    }
  });
  if (sums) {
    auto count_of = [&](int64_t b) { return std::min(pixels, unit - b % cuts * pixels); };
    combine_blocks(p.step == BnActStep::statistics ? Finish::statistics : Finish::backward, partial, blocks, count_of, p.C,
                   static_cast<T*>(p.out));
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
