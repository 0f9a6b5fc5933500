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

  // The padded image is made in squares of 2x2 pixels: square (y, x) has terms from the pixels y - 1, y and x - 1, x of the
  // small side. A row of that gives [ky][kx % 2][c] to the squares of two rows, from both neighbours: along the row a filter
  // of two taps, so three squares come of four products, by Winograd's F(3, 2).
  void to_large(const Source<T>& source, const Filters<const T>& weight, const Sink<T>& sink) const {
    int64_t registers = (8 * s.C + lanes<T> - 1) / lanes<T>, width = registers * lanes<T>;
    int64_t groups = (s.W + squares) / squares, size = groups * squares * width, step = std::max<int64_t>(1, 12 / groups);
    T* u = scratch<T>(Scratch::weight, points * s.K * width);
    weight_to_points(weight, registers, u);
    parallel(s.N, [&](int64_t image) {
      T* large = scratch<T>(Scratch::image, scheme.large.size() + lanes<T>);
      T* v = scratch<T>(Scratch::large, (step * points * groups + 1) * columns);
      T* zeros = v + step * points * groups * columns;
      T* products = scratch<T>(Scratch::sums, (step + 1) * size + lanes<T>);
      std::fill_n(zeros, columns, T(0));
      std::fill_n(products, size, T(0));
      for (int64_t y = 0; y <= s.H; y += step) {
        int64_t rows = std::min(step, s.H - y);
        for (int64_t r = 0; r < rows; r++) small_to_points(read_small_row(source, image, y + r), zeros, groups, v + r * groups * columns, rows * groups * columns);
        multiply_points(v, u, rows * groups, registers, products + size, source.a + (image * s.H + y + rows) * s.W * s.K, rows * s.W * s.K);
        if (rows < step) std::fill_n(products + (rows + 1) * size, size, T(0)), rows++;
        for (int64_t r = 0; r < rows; r++) write_squares(products + r * size, products + (r + 1) * size, width, large + 2 * (y + r) * line);
        std::copy_n(products + rows * size, size, products);
      }
      write_image(sink, image, s.LH, s.LW, s.C, scheme.large, large);
    });
  }

  static constexpr int points = 4, squares = 3;

  void weight_to_points(const Filters<const T>& weight, int64_t registers, T* u) const {
    int64_t tile = tile_of(registers) * lanes<T>, point = s.K * registers * lanes<T>;
    std::fill_n(u, points * point, T(0));
    for (int64_t column = 0; column < 8 * s.C; column++) {
      int64_t c = column % s.C, tap = column / (2 * s.C) * 4 + column / s.C % 2;
      T* to = u + column / tile * s.K * tile + column % tile;
      for (int64_t k = 0; k < s.K; k++, to += tile) {
        T right = *weight.at(k, c, tap), left = *weight.at(k, c, tap + 2);  // of the square's own pixel, of the one before
        to[0] = left, to[point] = (left + right) / 2, to[2 * point] = (left - right) / 2, to[3 * point] = right;
      }
    }
  }

  void small_to_points(const T* row, const T* zeros, int64_t groups, T* v, int64_t point) const {
    const int64_t columns = this->columns;  // a store could change what `this` points to
    for (int64_t group = 0; group < groups; group++, v += columns) {
      const T* pixel[points];
      for (int i = 0; i < points; i++) {
        int64_t x = squares * group - 1 + i;
        pixel[i] = x >= 0 && x < s.W ? row + x * columns : zeros;
      }
      for (int64_t k = 0; k < columns; k += lanes<T>) {
        Vec<T> d0 = load(pixel[0] + k), d1 = load(pixel[1] + k), d2 = load(pixel[2] + k), d3 = load(pixel[3] + k);
        store(v + k, d0 - d2), store(v + point + k, d1 + d2), store(v + 2 * point + k, d2 - d1), store(v + 3 * point + k, d3 - d1);
      }
    }
  }

  void multiply_points(const T* v, const T* u, int64_t groups, int64_t registers, T* product, const T* next, int64_t fetched) const {
    int64_t width = registers * lanes<T>, at_once = 12 / tile_of(registers);
    auto multiply = [&](int point, int square, bool accumulate) {
      for (int64_t group = 0; group < groups; group += at_once) {
        int64_t count = std::min(at_once, groups - group), share = fetched * count / (groups * points);
        for (int64_t i = 0; i < share; i += 64 / sizeof(T)) __builtin_prefetch(next + i, 0, 2);
        next += share;
        multiply_point(v + (point * groups + group) * columns, u + point * s.K * width, count, registers,
                       product + (group * squares + square) * width, accumulate);
      }
    };
    multiply(1, 0, false);
    multiply(2, 1, false);
    T* p = product;
    for (int64_t group = 0; group < groups; group++, p += squares * width) {
      for (int64_t j = 0; j < width; j += lanes<T>) {
        Vec<T> one = load(p + j), two = load(p + j + width);
        store(p + j, one + two), store(p + j + width, one - two), store(p + j + 2 * width, one + two);
      }
    }
    multiply(0, 0, true);
    multiply(3, 2, true);
  }

  static int64_t tile_of(int64_t registers) { return registers % 2 ? registers : 2; }

  void multiply_point(const T* v, const T* u, int64_t groups, int64_t registers, T* product, bool accumulate) const {
    switch (tile_of(registers)) {
      case 1: return multiply_tiles<1>(v, u, groups, registers, product, accumulate);
      case 2: return multiply_tiles<2>(v, u, groups, registers, product, accumulate);
      default: return multiply_tiles<3>(v, u, groups, registers, product, accumulate);
    }
  }

  template <int V>
  void multiply_tiles(const T* v, const T* u, int64_t groups, int64_t registers, T* product, bool accumulate) const {
    constexpr int64_t tile = V * lanes<T>;
    multiply_rows<T, V>(v, Strides{columns, 1, run_length, run_length}, u, s.K * tile, s.K, run_length, product, squares * registers * lanes<T>,
                        tile, registers / V, groups, accumulate);
  }

  // What a register writes too far the next one overwrites.
  void write_squares(const T* above, const T* below, int64_t width, T* to) const {
    const int64_t pair = 2 * s.C;
    for (int i = 0; i < 2; i++) {
      const T *upper = above + (2 + i) * pair, *lower = below + i * pair;
      T* out = to + i * line;
      for (int64_t left = s.W; left >= 0; left--, upper += width, lower += width, out += pair) {
        for (int64_t j = 0; j < pair; j += lanes<T>) store(out + j, load(upper + j) + load(lower + j));
      }
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
