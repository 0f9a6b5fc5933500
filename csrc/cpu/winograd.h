// Winograd's F(2x4, 2x2) for the four 2x2 stride-1 convolutions that a 4x4 stride-2 convolution splits into by the
// parity of its input: 15 multiplications for 2 x 4 outputs where the definition takes 32.
//
// Rows use F(2, 2) with the points 0, 1, infinity; columns F(4, 2) with 0, 1, -1, 1/2, infinity. Per dimension
//     out = At [(G w) * (Bt d)].
// Here stand the four maps that a convolution, its transpose and its weight gradient need: Bt and B on the large side
// (the input of a strided convolution), A and At on the small side, each one-dimensional and in place of nothing.
// F(4x4, 2x2) would take 25/64 instead of 15/32 of the products, but misses the tolerance (its error is 3.3 times the
// library's at 256 terms; F(2x4) with short runs stays below it).
#pragma once
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {

constexpr int tile_height = 2, tile_width = 4;              // of outputs
constexpr int points_y = tile_height + 1, points_x = tile_width + 1;
constexpr int winograd_points = points_y * points_x;

template <class T>
FASTGAN_INLINE Vec<T> times(double factor, Vec<T> x) {
  return x * splat(static_cast<T>(factor));
}

// Bt: 3 large-side values to 3 points, 5 to 5.
template <class T>
FASTGAN_INLINE void points_of_large(const Vec<T> (&d)[3], Vec<T> (&m)[3]) {
  m[0] = d[0] - d[1], m[1] = d[1], m[2] = d[2] - d[1];
}
template <class T>
FASTGAN_INLINE void points_of_large(const Vec<T> (&d)[5], Vec<T> (&m)[5]) {
  Vec<T> two = splat(T(2)), d13 = d[1] - d[3], d24 = d[2] - d[4], d21 = d[2] - d[1];
  m[0] = fma(-two, d13, d[0] - d[2]);
  m[1] = fma(two, d[3], d21);
  m[2] = fma(two, d[2] - d[3], d21);
  m[3] = d13;
  m[4] = fma(-two, d24, d13);
}

// B, its transpose: 3 points to 3 large-side values, 5 to 5.
template <class T>
FASTGAN_INLINE void large_of_points(const Vec<T> (&m)[3], Vec<T> (&x)[3]) {
  x[0] = m[0], x[1] = m[1] - m[0] - m[2], x[2] = m[2];
}
template <class T>
FASTGAN_INLINE void large_of_points(const Vec<T> (&m)[5], Vec<T> (&x)[5]) {
  Vec<T> two = splat(T(2)), m34 = m[3] + m[4];
  x[0] = m[0];
  x[1] = fma(-two, m[0], m34 - m[1] - m[2]);
  x[2] = fma(two, m[2] - m[4], m[1] + m[2] - m[0]);
  x[3] = fma(two, m[0] + m[1] - m[2], -m34);
  x[4] = two * m[4];
}

// A: 2 small-side values to 3 points, 4 to 5.
template <class T>
FASTGAN_INLINE void points_of_small(const Vec<T> (&g)[2], Vec<T> (&y)[3]) {
  y[0] = g[0], y[1] = g[0] + g[1], y[2] = g[1];
}
template <class T>
FASTGAN_INLINE void points_of_small(const Vec<T> (&g)[4], Vec<T> (&y)[5]) {
  Vec<T> even = g[0] + g[2], odd = g[1] + g[3];
  y[0] = g[0], y[1] = even + odd, y[2] = even - odd, y[4] = g[3];
  y[3] = fma(splat(T(0.5)), fma(splat(T(0.5)), fma(splat(T(0.5)), g[3], g[2]), g[1]), g[0]);
}

// At, its transpose: 3 points to 2 small-side values, 5 to 4.
template <class T>
FASTGAN_INLINE void small_of_points(const Vec<T> (&m)[3], Vec<T> (&o)[2]) {
  o[0] = m[0] + m[1], o[1] = m[1] + m[2];
}
template <class T>
FASTGAN_INLINE void small_of_points(const Vec<T> (&m)[5], Vec<T> (&o)[4]) {
  Vec<T> sum = m[1] + m[2], difference = m[1] - m[2];
  o[0] = m[0] + sum + m[3];
  o[1] = fma(splat(T(0.5)), m[3], difference);
  o[2] = fma(splat(T(0.25)), m[3], sum);
  o[3] = fma(splat(T(0.125)), m[3], difference) + m[4];
}

// G: 2 taps to 3 and 5 points.
template <class T>
FASTGAN_INLINE void points_of_weight(const Vec<T> (&w)[2], Vec<T> (&u)[3]) {
  u[0] = w[0], u[1] = w[0] + w[1], u[2] = w[1];
}
template <class T>
FASTGAN_INLINE void points_of_weight(const Vec<T> (&w)[2], Vec<T> (&u)[5]) {
  u[0] = w[0];
  u[1] = times<T>(0.5, w[0] + w[1]);
  u[2] = times<T>(1.0 / 6, w[0] - w[1]);
  u[3] = times<T>(4.0 / 3, w[0] + w[0] + w[1]);
  u[4] = times<T>(0.5, w[1]);
}

// Gt, its transpose: 3 and 5 points to 2 taps.
template <class T>
FASTGAN_INLINE void weight_of_points(const Vec<T> (&u)[3], Vec<T> (&w)[2]) {
  w[0] = u[0] + u[1], w[1] = u[1] + u[2];
}
template <class T>
FASTGAN_INLINE void weight_of_points(const Vec<T> (&u)[5], Vec<T> (&w)[2]) {
  Vec<T> half = times<T>(0.5, u[1]), sixth = times<T>(1.0 / 6, u[2]), four_thirds = times<T>(4.0 / 3, u[3]);
  w[0] = u[0] + half + sixth + four_thirds + four_thirds;
  w[1] = half - sixth + four_thirds + times<T>(0.5, u[4]);
}

// Applies a one-dimensional map to the rows and another to the columns: in [In0][In1] to out [Out0][Out1].
#define FASTGAN_TWO_DIMENSIONS(name, map, In0, In1, Out0, Out1)                     \
  template <class T>                                                               \
  FASTGAN_INLINE void name(const Vec<T> (&in)[In0][In1], Vec<T> (&out)[Out0][Out1]) { \
    Vec<T> half[In1][Out0];                                                        \
    _Pragma("GCC unroll 8") for (int j = 0; j < In1; j++) {                        \
      Vec<T> column[In0];                                                          \
      _Pragma("GCC unroll 8") for (int i = 0; i < In0; i++) column[i] = in[i][j];  \
      map<T>(column, half[j]);                                                     \
    }                                                                              \
    _Pragma("GCC unroll 8") for (int i = 0; i < Out0; i++) {                       \
      Vec<T> row[In1];                                                             \
      _Pragma("GCC unroll 8") for (int j = 0; j < In1; j++) row[j] = half[j][i];   \
      map<T>(row, out[i]);                                                         \
    }                                                                              \
  }

FASTGAN_TWO_DIMENSIONS(large_to_points, points_of_large, 3, 5, 3, 5)
FASTGAN_TWO_DIMENSIONS(points_to_large, large_of_points, 3, 5, 3, 5)
FASTGAN_TWO_DIMENSIONS(small_to_points, points_of_small, 2, 4, 3, 5)
FASTGAN_TWO_DIMENSIONS(points_to_small, small_of_points, 3, 5, 2, 4)
FASTGAN_TWO_DIMENSIONS(weight_to_points, points_of_weight, 2, 2, 3, 5)
FASTGAN_TWO_DIMENSIONS(points_to_weight, weight_of_points, 3, 5, 2, 2)
#undef FASTGAN_TWO_DIMENSIONS

}  // namespace fastgan::cpu::FASTGAN_ISA
