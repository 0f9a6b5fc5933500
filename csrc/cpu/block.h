// What stands between two convolutions, image by image: how a convolution's operand is made from what is stored, and
// what happens to its result on the way to memory. Notation of the design: v = s*(y - mu) + beta, z = phi(v),
// dy = A*g + B*(y - mu) + C.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {

// Per-channel constants: rows of a [rows, C] tensor.
enum ActivationRow { row_mean, row_scale, row_shift, activation_rows };  // more rows may follow
enum GradientRow { row_a, row_b, row_c, row_gradient_mean, gradient_rows };

// A batch may hold several one after the other, each with a set of constants, and of sums, of its own.
constexpr int64_t set_rows = 4;  // of a set of constants, of either kind
template <class Side>
Side of_image(Side side, int64_t image, int64_t C) {
  if (side.constants) side.constants += image / side.images_per_set * set_rows * C;
  return side;
}

template <class T>
FASTGAN_INLINE Vec<T> normalised(Vec<T> y, Vec<T> mean, Vec<T> scale, Vec<T> shift) {
  return fma(y - mean, scale, shift);
}

template <class T>
FASTGAN_INLINE Vec<T> activated(Vec<T> v, Vec<T> slope) {
  // slope 0 maps -inf to 0, not to NaN; NaN passes through.
  Vec<T> negative = slope == Vec<T>{} ? (v != v ? v : Vec<T>{}) : v * slope;
  return v > Vec<T>{} ? v : negative;
}

// dz * phi'(v): slope 0 gives 0 whatever dz is, infinity and NaN included.
template <class T>
FASTGAN_INLINE Vec<T> activated_gradient(Vec<T> dz, Vec<T> v, Vec<T> slope) {
  Vec<T> negative = slope == Vec<T>{} ? Vec<T>{} : dz * slope;
  return v > Vec<T>{} ? dz : negative;
}

// A convolution's operand, channels-last [N, H, W, C]:
//   plain:       a
//   activation:  phi(s*(a - mu) + beta),       constants [mu, s, beta]
//   gradient:    A*a + B*(b - mu) + C,         constants [A, B, C, mu]
enum class Operand { plain, activation, gradient };

// Stored as S, computed in T.
template <class T, class S = T>
struct Source {
  Operand kind = Operand::plain;
  const S* a = nullptr;
  const S* b = nullptr;
  const T* constants = nullptr;
  T slope = 1;
  int64_t images_per_set = 1;
};

// What becomes of a convolution's result x:
//   plain:       stored
//   statistics:  stored; mean and sum of squared deviations of each channel
//   backward:    stored as x * phi'(v(y)); its sum and the sum of its product with (y - mu), constants [mu, s, beta]
enum class Finish { plain, statistics, backward };

template <class T, class S = T>
struct Sink {
  Finish kind = Finish::plain;
  S* out = nullptr;
  const S* y = nullptr;
  const T* constants = nullptr;
  T slope = 1;
  int64_t images_per_set = 1;
  T* partial = nullptr;  // [image * blocks_per_image][2][C]
};

template <class T, Operand kind, class S>
FASTGAN_INLINE Vec<T> operand(const Source<T, S>& s, int64_t C, int64_t at, int64_t c, int64_t n) {
  Vec<T> a = load(s.a + at, n);
  auto constant = [&](int row) __attribute__((always_inline)) { return load(s.constants + row * C + c, n); };
  if constexpr (kind == Operand::activation) {
    return activated<T>(normalised<T>(a, constant(row_mean), constant(row_scale), constant(row_shift)), splat(s.slope));
  } else if constexpr (kind == Operand::gradient) {
    Vec<T> deviation = load(s.b + at, n) - constant(row_gradient_mean);
    return fma(constant(row_a), a, fma(constant(row_b), deviation, constant(row_c)));
  } else {
    return a;
  }
}

// `pixels` consecutive pixels from offset `at` on, to out [pixels][out_channels]; channels from C on become 0.
template <class T, Operand kind, class S, class To>
void operand_row(const Source<T, S>& s, int64_t C, int64_t at, int64_t pixels, To* out, int64_t out_channels) {
  for (int64_t i = 0; i < pixels; i++, at += C, out += out_channels) {
    int64_t c = 0;
    for (; c + lanes<T> <= C; c += lanes<T>) store(out + c, operand<T, kind>(s, C, at + c, c, lanes<T>));
    if (c < C) {
      store(out + c, operand<T, kind>(s, C, at + c, c, C - c), std::min<int64_t>(lanes<T>, out_channels - c));
      c += lanes<T>;
    }
    for (; c < out_channels; c += lanes<T>) store(out + c, Vec<T>{}, out_channels - c);
  }
}

// The same for whichever kind of operand it is.
template <class T, class S, class To>
void operand_pixels(const Source<T, S>& s, int64_t C, int64_t at, int64_t pixels, To* out, int64_t out_channels) {
  switch (s.kind) {
    case Operand::activation: return operand_row<T, Operand::activation>(s, C, at, pixels, out, out_channels);
    case Operand::gradient: return operand_row<T, Operand::gradient>(s, C, at, pixels, out, out_channels);
    case Operand::plain:
      if (out_channels == C) C *= pixels, out_channels = C, pixels = 1;
      return operand_row<T, Operand::plain>(s, C, at, pixels, out, out_channels);
  }
}

// Where an image stands in its padded working copy [rows][columns][channels]: from (border, border) on, 0 around it.
// The zeros come after the prologue by construction.
struct Frame {
  int64_t rows, columns, channels, border;
  int64_t size() const { return rows * columns * channels; }
  int64_t offset(int64_t y, int64_t x) const { return ((y + border) * columns + x + border) * channels; }
};

template <class T, class S, class To>
void read_image(const Source<T, S>& source, int64_t image, int64_t H, int64_t W, int64_t C, const Frame& frame, To* copy) {
  Source<T, S> s = of_image(source, image, C);
  int64_t below = frame.rows - frame.border - H, right = frame.columns - frame.border - W;
  std::fill_n(copy, frame.border * frame.columns * frame.channels, To{});
  std::fill_n(copy + frame.size() - below * frame.columns * frame.channels, below * frame.columns * frame.channels, To{});
  for (int64_t y = 0; y < H; y++) {
    To* row = copy + frame.offset(y, 0);
    int64_t at = (image * H + y) * W * C;
    std::fill_n(row - frame.border * frame.channels, frame.border * frame.channels, To{});
    std::fill_n(row + W * frame.channels, right * frame.channels, To{});
    operand_pixels(s, C, at, W, row, frame.channels);
  }
}

// Statistics are gathered in blocks of whole rows of one image, of about this many pixels, and combined in their order:
// the same for any number of threads.
constexpr int64_t block_pixels = 256;
inline int64_t block_rows(int64_t W) { return std::max<int64_t>(1, block_pixels / W); }
inline int64_t blocks_per_image(int64_t H, int64_t W) { return (H + block_rows(W) - 1) / block_rows(W); }

// How a result in working memory steps: by `row` per row, by `pair` per two pixels, by `odd` from the first of two to the second.
struct Steps {
  int64_t row, pair, odd;
  int64_t pixel(int64_t x) const { return (x >> 1) * pair + (x & 1) * odd; }
  bool is_dense(int64_t C) const { return odd == C && pair == 2 * C; }
};
inline Steps dense_steps(int64_t row, int64_t pixel) { return {row, 2 * pixel, pixel}; }

// What is left of a value that is stored as T, or as what an overload says.
template <class T>
FASTGAN_INLINE Vec<T> as_stored(const T*, Vec<T> value) {
  return value;
}

// One block of some registers of channels, n of the last; memory is dense.
template <class T, Finish kind, int count, class S>
FASTGAN_INLINE void finish_lanes(const Sink<T, S>& s, const T* in, const Steps& steps, int64_t at, int64_t rows, int64_t W,
                                 int64_t C, int64_t c, int64_t n, T* partial) {
  Vec<T> first[count] = {}, second[count] = {}, mean[count] = {}, scale[count], shift[count], slope = splat(s.slope);
  auto constant = [&](int row, int i) __attribute__((always_inline)) { return load(s.constants + row * C + c + i * lanes<T>, n); };
  if constexpr (kind == Finish::statistics) {
    // A first pass for the mean, nearly: sums of differences from it lose no digits, whatever it is.
    for (int64_t y = 0; y < rows; y++) {
      for (int64_t x = 0; x < W; x++) {
        const T* p = in + y * steps.row + steps.pixel(x);
        FASTGAN_UNROLL for (int i = 0; i < count; i++) mean[i] += as_stored(s.out, load(p + i * lanes<T>, n));
      }
    }
    FASTGAN_UNROLL for (int i = 0; i < count; i++) mean[i] /= splat(static_cast<T>(rows * W));
  } else {
    FASTGAN_UNROLL for (int i = 0; i < count; i++) {
      mean[i] = constant(row_mean, i), scale[i] = constant(row_scale, i), shift[i] = constant(row_shift, i);
    }
  }
  for (int64_t y = 0; y < rows; y++, in += steps.row) {
    for (int64_t x = 0; x < W; x++, at += C) {
      const T* p = in + steps.pixel(x);
      FASTGAN_UNROLL for (int i = 0; i < count; i++) {
        Vec<T> value = load(p + i * lanes<T>, n);
        if constexpr (kind == Finish::statistics) {
          value = as_stored(s.out, value);
          Vec<T> d = value - mean[i];
          first[i] += d, second[i] = fma(d, d, second[i]);
        } else {
          Vec<T> raw = load(s.y + at + i * lanes<T>, n);
          value = as_stored(s.out, activated_gradient<T>(value, normalised<T>(raw, mean[i], scale[i], shift[i]), slope));
          first[i] += value, second[i] = fma(value, raw - mean[i], second[i]);
        }
        store(s.out + at + i * lanes<T>, value, n);
      }
    }
  }
  FASTGAN_UNROLL for (int i = 0; i < count; i++) {
    if constexpr (kind == Finish::statistics) {
      Vec<T> terms = splat(static_cast<T>(rows * W)), offset = first[i] / terms;
      second[i] = second[i] - first[i] * offset;
      first[i] = mean[i] + offset;
    }
    T* sums = partial + c + i * lanes<T>;
    store(sums, first[i], n), store(sums + C, second[i], n);
  }
}

template <class T, Finish kind, class S>
void finish_block(const Sink<T, S>& s, const T* in, const Steps& steps, int64_t at, int64_t rows, int64_t W, int64_t C,
                  T* partial) {
  constexpr int count = sizeof(T) / sizeof(S);  // registers that fill a cache line of what is stored
  int64_t c = 0;
  for (; c + count * lanes<T> <= C; c += count * lanes<T>) {
    finish_lanes<T, kind, count>(s, in + c, steps, at + c, rows, W, C, c, lanes<T>, partial);
  }
  for (; c < C; c += lanes<T>) {
    finish_lanes<T, kind, 1>(s, in + c, steps, at + c, rows, W, C, c, std::min<int64_t>(lanes<T>, C - c), partial);
  }
}

template <class T, class S>
void store_block(const Sink<T, S>& s, const T* in, const Steps& steps, int64_t at, int64_t rows, int64_t W, int64_t C) {
  for (int64_t y = 0; y < rows; y++, in += steps.row) {
    for (int64_t x = 0; x < W; x++, at += C) {
      const T* p = in + steps.pixel(x);
      int64_t c = 0;
      for (; c + lanes<T> <= C; c += lanes<T>) store(s.out + at + c, load(p + c));
      if (c < C) store(s.out + at + c, load(p + c, C - c), C - c);
    }
  }
}

// The block of rows from y on; `in` is its first pixel.
template <class T, class S>
void write_block(const Sink<T, S>& sink, int64_t image, int64_t H, int64_t W, int64_t C, int64_t y, const T* in,
                 const Steps& steps) {
  Sink<T, S> s = of_image(sink, image, C);
  int64_t rows = std::min(block_rows(W), H - y), at = (image * H + y) * W * C;
  int64_t block = image * blocks_per_image(H, W) + y / block_rows(W), sums = block * 2 * C;
  switch (s.kind) {
    case Finish::statistics:
      return finish_block<T, Finish::statistics>(s, in, steps, at, rows, W, C, s.partial + sums);
    case Finish::backward:
      return finish_block<T, Finish::backward>(s, in, steps, at, rows, W, C, s.partial + sums);
    case Finish::plain:
      if (steps.is_dense(C)) C *= W, W = 1;
      return store_block(s, in, steps, at, rows, W, C);
  }
}

// `in` is the image's first pixel.
template <class T, class S>
void write_image(const Sink<T, S>& s, int64_t image, int64_t H, int64_t W, int64_t C, const T* in, const Steps& steps) {
  for (int64_t y = 0; y < H; y += block_rows(W)) write_block(s, image, H, W, C, y, in + y * steps.row, steps);
}

template <class T, class S>
void write_image(const Sink<T, S>& s, int64_t image, int64_t H, int64_t W, int64_t C, const Frame& frame, const T* copy) {
  write_image(s, image, H, W, C, copy + frame.offset(0, 0), dense_steps(frame.columns * frame.channels, frame.channels));
}

// Combines the blocks' (mean, m2) by Chan's rule, or adds up their two sums, in the order of the blocks and in double.
// count_of(block) is the number of values per channel in a block.
template <class T, class F>
void combine_blocks(Finish kind, const T* partial, int64_t blocks, const F& count_of, int64_t C, T* out) {
  constexpr int64_t share = 128;  // channels
  parallel((C + share - 1) / share, [&](int64_t task) {
    int64_t from = task * share, some = std::min(share, C - from);
    double first[share] = {}, second[share] = {}, count = 0;
    const T* at = partial + from;
    for (int64_t block = 0; block < blocks; block++, at += 2 * C) {
      double n = static_cast<double>(count_of(block)), total = count + n;
      for (int64_t c = 0; c < some; c++) {
        if (kind == Finish::statistics) {
          double delta = at[c] - first[c];
          first[c] += delta * (n / total);
          second[c] += at[C + c] + delta * delta * (count * n / total);
        } else {
          first[c] += at[c], second[c] += at[C + c];
        }
      }
      count = total;
    }
    std::copy_n(first, some, out + from);
    std::copy_n(second, some, out + C + from);
  });
}

}  // namespace fastgan::cpu::FASTGAN_ISA
