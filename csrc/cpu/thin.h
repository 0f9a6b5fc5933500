// The large side an image of few channels: the first convolution of a discriminator, the last of a generator and their
// gradients. Depth on the large side is (ky, kx, c), so a pixel of the small side meets `reach` consecutive values in each
// of 4 rows of the padded image: products to the small side and to the weight read those in place, without im2col.
//
// To the large side, of 1 to 4 channels, the padded image is made in squares of 2x2 pixels: square (y, x) has terms from the
// pixels y - 1, y and x - 1, x of the small side. A row of that gives [ky][kx % 2][c] to the squares of two rows; along it
// this is a filter of two taps, so that three squares come of four products (Winograd's F(3, 2)):
//   points of the small side    d0 - d2, d1 + d2, d2 - d1, d3 - d1        of the pixels d around the three
//   of the weight               left, (left + right) / 2, (left - right) / 2, right
//   squares of the products m   m0 + m1 + m2, m1 - m2, m3 + m1 + m2
// The error is the library's from K = 16 on; of K = 1, four terms an output, it is 1.7 times that.
#pragma once
#include "cpu/parallel.h"
#include "cpu/schemes.h"
#include "cpu/scratch.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <class T>
struct Thin {
  static constexpr int points = 4, squares = 3;
  Sizes s;
  Direct<T> scheme;
  int64_t reach, depth, columns, panels_of_k, line;  // columns: K in whole panels; line: one row of the padded image
  int64_t registers, width, groups;  // of [ky][kx % 2][c]: in registers, in values; groups of squares that cover a row

  explicit Thin(const Sizes& s)
      : s(s),
        scheme(s),
        reach(4 * s.C),
        depth(4 * reach),
        columns(padded<T>(s.K)),
        panels_of_k(panels<T>(s.K)),
        line(scheme.large.columns * s.C),
        registers((8 * s.C + lanes<T> - 1) / lanes<T>),
        width(registers * lanes<T>),
        groups((s.W + squares) / squares) {}

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
  void to_large(const Source<T, S>& source, const Filters<const T>& weight, const Sink<T, S>& sink) const {
    T* u = scratch<T>(Scratch::weight, points * s.K * width);
    weight_to_row_points(weight, u);
    // As many rows at once as a tile has, where they are short.
    int64_t step = std::max<int64_t>(1, micro_rows<1> / groups), row = groups * squares * width;
    parallel(s.N, [&](int64_t image) {
      T* large = scratch<T>(Scratch::image, scheme.large.size() + lanes<T>);
      T* v = scratch<T>(Scratch::large, (step * groups * points + 1) * columns);
      T* zeros = v + step * groups * points * columns;
      T* product = scratch<T>(Scratch::sums, 2 * step * row + lanes<T>);
      T *other = product + step * row, *above = other;  // the rows of the step before, of which the last is still needed
      std::fill_n(zeros, columns, T(0));
      std::fill_n(above, row, T(0));
      for (int64_t y = 0; y <= s.H; y += step, std::swap(product, other)) {
        int64_t rows = std::min(step, s.H - y), last = std::min(step, s.H + 1 - y);
        if (rows > 0) {
          small_to_row_points(read_small_rows(source, image, y, rows), zeros, rows, v);
          multiply_row_points(v, u, rows * groups, source.a + small_row(image, y + rows), product);
        }
        if (rows < last) std::fill_n(product + rows * row, row, T(0));  // nothing is below the last squares
        for (int64_t r = 0; r < last; r++) {
          T* below = product + r * row;
          write_squares(above, below, large + 2 * (y + r) * line);
          above = below;
        }
      }
      write_image(sink, image, s.LH, s.LW, s.C, scheme.large, large);
    });
  }

  // To u [points][tiles of registers][K][tile].
  void weight_to_row_points(const Filters<const T>& weight, T* u) const {
    int64_t tile = tile_registers() * lanes<T>, point = s.K * width;
    std::fill_n(u, points * point, T(0));
    for (int64_t column = 0; column < 8 * s.C; column++) {
      int64_t c = column % s.C, tap = column / (2 * s.C) * 4 + column / s.C % 2;
      T* to = u + column / tile * s.K * tile + column % tile;
      for (int64_t k = 0; k < s.K; k++, to += tile) {
        T left = *weight.at(k, c, tap + 2), right = *weight.at(k, c, tap);  // the pixels' that stand left and right
        to[0] = left, to[point] = (left + right) / 2, to[2 * point] = (left - right) / 2, to[3 * point] = right;
      }
    }
  }

  // To v [points][rows][groups][columns]; pixels beyond the row are `zeros`.
  void small_to_row_points(const T* small, const T* zeros, int64_t rows, T* v) const {
    const int64_t columns = this->columns, point = rows * groups * columns;  // any store could change what `this` points to
    for (const T* end = small + rows * s.W * columns; small < end; small += s.W * columns) {
      for (int64_t x = -1; x < s.W; x += squares, v += columns) {
        const T* d[points];
        for (int i = 0; i < points; i++) d[i] = x + i >= 0 && x + i < s.W ? small + (x + i) * columns : zeros;
        for (int64_t k = 0; k < columns; k += lanes<T>) {
          Vec<T> d0 = load(d[0] + k), d1 = load(d[1] + k), d2 = load(d[2] + k), d3 = load(d[3] + k);
          store(v + k, d0 - d2), store(v + point + k, d1 + d2), store(v + 2 * point + k, d2 - d1), store(v + 3 * point + k, d3 - d1);
        }
      }
    }
  }

  // To squares [count][squares][width], while memory brings `next`.
  template <class S>
  void multiply_row_points(const T* v, const T* u, int64_t count, const S* next, T* to) const {
    int64_t step = micro_rows<1> / tile_registers();
    Ahead ahead;
    ahead.add(next, count * squares * s.K);
    ahead.spread(points * ((count + step - 1) / step));
    auto multiply = [&](int point, int square, bool accumulate) {
      for (int64_t i = 0; i < count; i += step) {
        ahead();
        const T *rows = v + (point * count + i) * columns, *weight = u + point * s.K * width;
        T* sums = to + (i * squares + square) * width;
        switch (tile_registers()) {
          case 1: multiply_tiles<1>(rows, weight, std::min(step, count - i), sums, accumulate); break;
          case 2: multiply_tiles<2>(rows, weight, std::min(step, count - i), sums, accumulate); break;
          default: multiply_tiles<3>(rows, weight, std::min(step, count - i), sums, accumulate);
        }
      }
    };
    multiply(1, 0, false);
    multiply(2, 1, false);
    const int64_t width = this->width;
    for (T* m = to; m < to + count * squares * width; m += squares * width) {
      for (int64_t i = 0; i < width; i += lanes<T>) {
        Vec<T> m1 = load(m + i), m2 = load(m + width + i);
        store(m + i, m1 + m2), store(m + width + i, m1 - m2), store(m + 2 * width + i, m1 + m2);
      }
    }
    multiply(0, 0, true);
    multiply(3, 2, true);
  }

  int64_t tile_registers() const { return registers % 2 ? registers : 2; }

  template <int V>
  void multiply_tiles(const T* v, const T* u, int64_t rows, T* to, bool accumulate) const {
    constexpr int64_t tile = V * lanes<T>;
    if constexpr (V == 2 || tile == 8 || tile == 16 || tile == 24) {  // no number of channels leads elsewhere
      multiply_rows<T, V>(v, RowStrides{columns, run_length, run_length}, u, s.K * tile, s.K, run_length, to, squares * width, tile,
                          registers / V, rows, accumulate);
    } else {
      __builtin_unreachable();
    }
  }

  // Two rows of the image, of what the rows of the small side above and below them give. What a register writes too far, the
  // next one overwrites.
  void write_squares(const T* above, const T* below, T* to) const {
    const int64_t pair = 2 * s.C, width = this->width;
    for (int i = 0; i < 2; i++) {
      const T *upper = above + (2 + i) * pair, *lower = below + i * pair;
      T* out = to + i * line;
      for (int64_t left = s.W; left >= 0; left--, upper += width, lower += width, out += pair) {
        for (int64_t j = 0; j < pair; j += lanes<T>) store(out + j, load(upper + j) + load(lower + j));
      }
    }
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
