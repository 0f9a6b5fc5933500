// To a large side of few channels where a register holds fewer than four pixels of it. The padded image is made in squares of
// 2x2 pixels: square (y, x) has terms from the pixels y - 1, y and x - 1, x of the small side. A row of that gives
// [ky][kx % 2][c] to the squares of two rows; along it this is a filter of two taps, so that three squares come of four products
// (Winograd's F(3, 2)):
//   points of the small side    d0 - d2, d1 + d2, d2 - d1, d3 - d1        of the pixels d around the three
//   of the weight               left, (left + right) / 2, (left - right) / 2, right
//   squares of the products m   m0 + m1 + m2, m1 - m2, m3 + m1 + m2
// The error is the library's from K = 16 on; of K = 1, four terms an output, it is 1.7 times that.
#pragma once
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/thin.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <class T>
struct ThinToLarge {
  static constexpr int points = 4, squares = 3;
  Thin<T> thin;
  Sizes s;
  int64_t registers, width, groups;  // of [ky][kx % 2][c]: in registers, in values; groups of squares that cover a row

  explicit ThinToLarge(const Sizes& s)
      : thin(s),
        s(s),
        registers((8 * s.C + lanes<T> - 1) / lanes<T>),
        width(registers * lanes<T>),
        groups((s.W + squares) / squares) {}

  template <class S>
  void to_large(const Source<T, S>& source, const Filters<const T>& weight, const Sink<T, S>& sink) const {
    T* u = scratch<T>(Scratch::weight, points * s.K * width);
    weight_to_row_points(weight, u);
    // As many rows at once as a tile has, where they are short.
    int64_t step = std::max<int64_t>(1, micro_rows<1> / groups), row = groups * squares * width;
    parallel(s.N, [&](int64_t image) {
      T* large = scratch<T>(Scratch::image, thin.scheme.large.size() + lanes<T>);
      T* v = scratch<T>(Scratch::large, (step * groups * points + 1) * thin.columns);
      T* zeros = v + step * groups * points * thin.columns;
      T* product = scratch<T>(Scratch::sums, 2 * step * row + lanes<T>);
      T *other = product + step * row, *above = other;  // the rows of the step before, of which the last is still needed
      std::fill_n(zeros, thin.columns, T(0));
      std::fill_n(above, row, T(0));
      for (int64_t y = 0; y <= s.H; y += step, std::swap(product, other)) {
        int64_t rows = std::min(step, s.H - y), last = std::min(step, s.H + 1 - y);
        if (rows > 0) {
          small_to_row_points(thin.read_small_rows(source, image, y, rows), zeros, rows, v);
          multiply_row_points(v, u, rows * groups, source.a + thin.small_row(image, y + rows), product);
        }
        if (rows < last) std::fill_n(product + rows * row, row, T(0));  // nothing is below the last squares
        for (int64_t r = 0; r < last; r++) {
          T* below = product + r * row;
          write_squares(above, below, large + 2 * (y + r) * thin.line);
          above = below;
        }
      }
      write_image(sink, image, s.LH, s.LW, s.C, thin.scheme.large, large);
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
    const int64_t columns = thin.columns, point = rows * groups * columns;  // any store could change what `this` points to
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
        const T *rows = v + (point * count + i) * thin.columns, *weight = u + point * s.K * width;
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
    if constexpr (V == 2 || tile == 8 || tile == 24) {  // no number of channels leads elsewhere
      multiply_rows<T, V>(v, RowStrides{thin.columns, run_length, run_length}, u, s.K * tile, s.K, run_length, to, squares * width,
                          tile, registers / V, rows, accumulate);
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
      T* out = to + i * thin.line;
      for (int64_t left = s.W; left >= 0; left--, upper += width, lower += width, out += pair) {
        for (int64_t j = 0; j < pair; j += lanes<T>) store(out + j, load(upper + j) + load(lower + j));
      }
    }
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
