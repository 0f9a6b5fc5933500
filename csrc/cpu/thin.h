// The large side an image of 1 to 4 channels: the first convolution of a discriminator, the last of a generator and their
// gradients. The products read the image's rows in place, without im2col. Depth on the large side is (ky, kx, c), so a
// pixel of the small side meets `reach` consecutive values in each of 4 rows of the padded image.
#pragma once
#include "cpu/parallel.h"
#include "cpu/schemes.h"
#include "cpu/scratch.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t thin_channels = 4;
constexpr int64_t pixels_at_once = 2 * micro_rows;  // that memory must have ready before all are multiplied

template <class T>
struct Thin {
  Sizes s;
  Direct<T> scheme;
  int64_t reach, depth, columns, panels_of_k, line;  // columns: K in whole panels; line: one row of the padded image

  explicit Thin(const Sizes& s)
      : s(s),
        scheme(s),
        reach(4 * s.C),
        depth(4 * reach),
        columns(padded<T>(s.K)),
        panels_of_k(panels<T>(s.K)),
        line(scheme.large.columns * s.C) {}

  const T* read_large(const Source<T>& source, int64_t image) const {
    T* copy = scratch<T>(Scratch::image, scheme.large.size());
    read_image(source, image, s.LH, s.LW, s.C, scheme.large, copy);
    return copy;
  }

  // Row y of the small side, [W][columns]; the next one is asked for, as rows come once and from memory.
  const T* read_small_row(const Source<T>& source, int64_t image, int64_t y) const {
    int64_t at = (image * s.H + y) * s.W * s.K;
    constexpr int64_t cache_line = 64 / sizeof(T);
    for (int64_t i = s.W * s.K; i < 2 * s.W * s.K; i += cache_line) __builtin_prefetch(source.a + at + i, 0, 2);
    if (source.kind == Operand::plain && columns == s.K) return source.a + at;
    T* row = scratch<T>(Scratch::small, s.W * columns);
    operand_pixels(of_image(source, image, s.K), s.K, at, s.W, row, columns);
    return row;
  }

  void to_small(const Source<T>& source, const Filters<const T>& weight, const Sink<T>& sink) const {
    bool in_place = sink.kind == Finish::plain && columns == s.K;
    T* u = scratch<T>(Scratch::weight, depth * columns);
    scheme.weight_to_small(weight, 0, panels_of_k, 0, depth, u, 0);
    parallel(s.N, [&](int64_t image) {
      const T* large = read_large(source, image);
      int64_t step = block_rows(s.W);
      for (int64_t y = 0; y < s.H; y += step) {
        int64_t rows = std::min(step, s.H - y);
        T* out = in_place ? sink.out + (image * s.H + y) * s.W * s.K : scratch<T>(Scratch::small, rows * s.W * columns);
        for (int64_t r = 0; r < rows; r++) {
          multiply_rows(large + 2 * (y + r) * line, Strides{2 * s.C, 1, reach, line}, u, depth * panel<T>, depth, depth,
                        out + r * s.W * columns, columns, panel<T>, panels_of_k, s.W, false);
        }
        if (!in_place) write_block(sink, image, s.H, s.W, s.K, y, out, columns, s.W * columns);
      }
    });
  }

  void to_large(const Source<T>& source, const Filters<const T>& weight, const Sink<T>& sink) const {
    int64_t width = padded<T>(depth);
    T* u = scratch<T>(Scratch::weight, columns * width);
    scheme.weight_to_large(weight, 0, panels<T>(depth), 0, columns, u, 0);
    parallel(s.N, [&](int64_t image) {
      T* large = scratch<T>(Scratch::image, scheme.large.size());
      T* product = scratch<T>(Scratch::sums, s.W * width);
      std::fill_n(large, scheme.large.size(), T(0));
      for (int64_t y = 0; y < s.H; y++) {
        const T* row = read_small_row(source, image, y);
        for (int64_t x = 0; x < s.W; x += pixels_at_once) {
          multiply_rows(row + x * columns, Strides{columns, 1, run_length, run_length}, u, columns * panel<T>, columns, run_length,
                        product + x * width, width, panel<T>, panels<T>(depth), std::min(pixels_at_once, s.W - x), false);
        }
        switch (s.C) {
          case 1: add_row<2>(product, large + 2 * y * line); break;
          case 2: add_row<4>(product, large + 2 * y * line); break;
          case 3: add_row<6>(product, large + 2 * y * line); break;
          default: add_row<8>(product, large + 2 * y * line);
        }
      }
      write_image(sink, image, s.LH, s.LW, s.C, scheme.large, large);
    });
  }

  // Adds one row of small pixels, [W][4][2 * half] and whole panels of it, to the four rows of the image that they meet:
  // neighbours share half of their columns, added in one go, for a sum just stored is slow to read again.
  template <int half>
  void add_row(const T* product, T* large) const {
    constexpr int64_t pixel = padded<T>(8 * half);
    for (int ky = 0; ky < 4; ky++, product += 2 * half, large += line) {
      const T* from = product;
      T* to = large;
      for (int i = 0; i < half; i++) to[i] += from[i];
      for (int64_t x = 1; x < s.W; x++) {
        const T* before = from + half;
        from += pixel, to += half;
        T sum[half];
        for (int i = 0; i < half; i++) sum[i] = to[i] + (before[i] + from[i]);
        std::copy_n(sum, half, to);
      }
      for (int i = 0; i < half; i++) to[half + i] += from[half + i];
    }
  }

  void to_weight(const Source<T>& large_source, const Source<T>& small_source, const Filters<T>& weight) const {
    int64_t size = depth * columns;
    T* sums = scratch<T>(Scratch::partial, s.N * size);  // of each image, then added in their order
    parallel(s.N, [&](int64_t image) {
      const T* large = read_large(large_source, image);
      for (int64_t y = 0; y < s.H; y++) {
        const T* small = read_small_row(small_source, image, y);
        for (int64_t x = 0; x < s.W; x += run_length) {
          int64_t count = std::min<int64_t>(run_length, s.W - x);
          for (int64_t j = 0; j < columns; j += panel<T>) {
            for (int ky = 0; ky < 4; ky++) {
              const T* a = large + (2 * y + ky) * line + 2 * x * s.C;
              T* to = sums + image * size + ky * reach * columns + j;
              if (reach % 6 == 0) {
                add_products<6>(a, small + x * columns + j, count, to, y + x > 0);
              } else {
                add_products<4>(a, small + x * columns + j, count, to, y + x > 0);
              }
            }
          }
        }
      }
    });
    for (int64_t image = 1; image < s.N; image++) {
      for (int64_t i = 0; i < size; i++) sums[i] += sums[image * size + i];
    }
    for (int64_t k = 0; k < s.K; k++) {
      for (int64_t d = 0; d < depth; d++) *weight.at(k, d % s.C, d / s.C) = sums[d * columns + k];
    }
  }

  template <int R>
  void add_products(const T* a, const T* small, int64_t pixels, T* to, bool accumulate) const {
    for (int64_t i = 0; i < reach; i += R) {
      micro_run<T, R>(a + i, Strides{1, 2 * s.C, pixels, 0}, small, columns, pixels, to + i * columns, columns, accumulate);
    }
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
