// The large side an image of few channels: the first convolution of a discriminator, the last of a generator and their
// gradients. Depth on the large side is (ky, kx, c), so a pixel of the small side meets `reach` consecutive values in each
// of 4 rows of the padded image: products to the small side and to the weight read those in place, without im2col. To the large
// side see thin_shares.h and thin_squares.h.
#pragma once
#include "cpu/parallel.h"
#include "cpu/schemes.h"
#include "cpu/scratch.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

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

  template <class S>
  const T* read_large(const Source<T, S>& source, int64_t image) const {
    T* copy = scratch<T>(Scratch::image, scheme.large.size());
    read_image(source, image, s.LH, s.LW, s.C, scheme.large, copy);
    return copy;
  }

  int64_t small_row(int64_t image, int64_t y) const { return (image * s.H + y) * s.W * s.K; }

  // Rows y .. y + rows - 1 of the small side, [rows * W][columns].
  template <class S>
  const T* read_small_rows(const Source<T, S>& source, int64_t image, int64_t y, int64_t rows) const {
    int64_t at = small_row(image, y);
    if constexpr (std::is_same_v<S, T>) {
      if (source.kind == Operand::plain && columns == s.K) return source.a + at;
    }
    T* copy = scratch<T>(Scratch::small, rows * s.W * columns);
    operand_pixels(of_image(source, image, s.K), s.K, at, rows * s.W, copy, columns);
    return copy;
  }

  template <class S>
  void to_small(const Source<T, S>& source, const Filters<const T>& weight, const Sink<T, S>& sink) const {
    bool in_place = std::is_same_v<S, T> && sink.kind == Finish::plain && columns == s.K;
    T* u = scratch<T>(Scratch::weight, depth * columns);
    scheme.weight_to_small(weight, 0, panels_of_k, 0, depth, u, 0);
    parallel(s.N, [&](int64_t image) {
      const T* large = read_large(source, image);
      int64_t step = block_rows(s.W);
      for (int64_t y = 0; y < s.H; y += step) {
        int64_t rows = std::min(step, s.H - y);
        T* out = scratch<T>(Scratch::small, in_place ? 0 : rows * s.W * columns);
        if constexpr (std::is_same_v<S, T>) {
          if (in_place) out = sink.out + small_row(image, y);
        }
        for (int64_t r = 0; r < rows; r++) {
          multiply_rows<T, 2>(large + 2 * (y + r) * line, RowStrides{2 * s.C, reach, line}, u, depth * panel<T>, depth, depth,
                              out + r * s.W * columns, columns, panel<T>, panels_of_k, s.W, false);
        }
        if (!in_place) write_block(sink, image, s.H, s.W, s.K, y, out, dense_steps(s.W * columns, columns));
      }
    });
  }

  template <class S>
  void to_weight(const Source<T, S>& large_source, const Source<T, S>& small_source, const Filters<T>& weight) const {
    int64_t size = depth * columns;  // of the sums of one image; as many are kept, to be added in their order, as caches hold
    int64_t together = std::clamp<int64_t>((int64_t{8} << 20) / (size * sizeof(T)), 16, 128);
    T* sums = scratch<T>(Scratch::partial, std::min(s.N, together) * size);
    for (int64_t first = 0; first < s.N; first += together) {
      int64_t images = std::min(together, s.N - first);
      parallel(images, [&](int64_t i) { sum_image(large_source, small_source, first + i, sums + i * size); });
      parallel(panels_of_k, [&](int64_t p) { add_images(sums, images, p * panel<T>, first > 0, weight); });
    }
  }

  // To sums [depth][columns].
  template <class S>
  void sum_image(const Source<T, S>& large_source, const Source<T, S>& small_source, int64_t image, T* sums) const {
    int64_t across = std::min<int64_t>(s.W, run_length), down = std::max<int64_t>(1, run_length / s.W);  // pixels of one run
    const T* large = read_large(large_source, image);
    for (int64_t y = 0; y < s.H; y += down) {
      int64_t rows = std::min(down, s.H - y);
      const T* small = read_small_rows(small_source, image, y, rows);
      for (int64_t x = 0; x < s.W; x += across) {
        int64_t count = std::min(across, s.W - x);
        Ahead ahead;
        ahead.add(small_source.a + small_row(image, y + rows) + x * s.K, rows * count * s.K);
        ahead.spread(4 * panels_of_k);
        for (int64_t j = 0; j < columns; j += panel<T>) {
          for (int ky = 0; ky < 4; ky++) {
            ahead();
            const T* a = large + (2 * y + ky) * line + 2 * x * s.C;
            ColumnStrides pixels{2 * s.C, count, 2 * line};
            T* to = sums + ky * reach * columns + j;
            if (reach % 6 == 0) {
              add_products<6>(a, pixels, small + x * columns + j, rows * count, to, y + x > 0);
            } else {
              add_products<4>(a, pixels, small + x * columns + j, rows * count, to, y + x > 0);
            }
          }
        }
      }
    }
  }

  // The gradient of a panel of filters from k on.
  void add_images(const T* sums, int64_t images, int64_t k, bool accumulate, const Filters<T>& weight) const {
    int64_t filters = std::min<int64_t>(panel<T>, s.K - k);
    for (int64_t d = 0; d < depth; d++) {
      T sum[panel<T>] = {};
      for (int64_t i = 0; accumulate && i < filters; i++) sum[i] = *weight.at(k + i, d % s.C, d / s.C);
      for (int64_t image = 0; image < images; image++) {
        for (int i = 0; i < panel<T>; i++) sum[i] += sums[(image * depth + d) * columns + k + i];
      }
      for (int64_t i = 0; i < filters; i++) *weight.at(k + i, d % s.C, d / s.C) = sum[i];
    }
  }

  template <int R>
  void add_products(const T* a, const ColumnStrides& pixels, const T* small, int64_t count, T* to, bool accumulate) const {
    for (int64_t i = 0; i < reach; i += R) {
      micro_run<T, R>(a + i, pixels, small, columns, count, to + i * columns, columns, accumulate);
    }
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
