// Winograd's F(4x4, 2x2) for the four 2x2 stride-1 convolutions that a 4x4 stride-2 convolution splits into by the
// parity of its input: 25 multiplications for 4 x 4 outputs where the definition takes 64.
//
// In both dimensions the points are 3/8, -3/8, 5/4, -5/4 and infinity. Per dimension
//     out = At [(G w) * (Bt d)].
// Here stand the six maps that a convolution, its transpose and its weight gradient need: Bt and B on the large side (the
// input of a strided convolution), A and At on the small side, G and Gt for weights, each one-dimensional.
// The points decide the error: with the usual 0, 1, -1, 1/2 and infinity it is more than twice as large (docs/speed.md). All are
// short binary fractions: but for G and Gt the coefficients are exact.
#pragma once
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {

constexpr int tile = 4;  // outputs, in both dimensions
constexpr int line_points = tile + 1, winograd_points = line_points * line_points;
constexpr double inner_point = 0.375, outer_point = 1.25;
constexpr double inner_square = inner_point * inner_point, outer_square = outer_point * outer_point;
constexpr double common_factor = 0.5 / (outer_square - inner_square);  // of G

template <class T>
FASTGAN_INLINE Vec<T> fixed(double x) {
  return splat(static_cast<T>(x));
}

// Bt: 5 large-side values to 5 points.
template <class T>
FASTGAN_INLINE void points_of_large(const Vec<T> (&d)[5], Vec<T> (&m)[5]) {
  Vec<T> even_inner = fma(fixed<T>(outer_square), d[1], -d[3]), odd_inner = fma(fixed<T>(outer_square), d[0], -d[2]);
  Vec<T> even_outer = fma(fixed<T>(-inner_square), d[1], d[3]), odd_outer = fma(fixed<T>(-inner_square), d[0], d[2]);
  m[0] = fma(fixed<T>(inner_point), odd_inner, even_inner), m[1] = fma(fixed<T>(-inner_point), odd_inner, even_inner);
  m[2] = fma(fixed<T>(outer_point), odd_outer, even_outer), m[3] = fma(fixed<T>(-outer_point), odd_outer, even_outer);
  m[4] = fma(fixed<T>(-outer_square), odd_outer, fma(fixed<T>(-inner_square), d[2], d[4]));
}

// B, its transpose.
template <class T>
FASTGAN_INLINE void large_of_points(const Vec<T> (&m)[5], Vec<T> (&x)[5]) {
  Vec<T> sum_inner = m[0] + m[1], sum_outer = m[2] + m[3];
  Vec<T> inner_times = fixed<T>(inner_point) * (m[0] - m[1]), outer_times = fma(fixed<T>(-outer_square), m[4], fixed<T>(outer_point) * (m[2] - m[3]));
  x[0] = fma(fixed<T>(outer_square), inner_times, fixed<T>(-inner_square) * outer_times);
  x[1] = fma(fixed<T>(outer_square), sum_inner, fixed<T>(-inner_square) * sum_outer);
  x[2] = fma(fixed<T>(-inner_square), m[4], outer_times - inner_times);
  x[3] = sum_outer - sum_inner;
  x[4] = m[4];
}

// A: 4 small-side values to 5 points.
template <class T>
FASTGAN_INLINE void points_of_small(const Vec<T> (&g)[4], Vec<T> (&y)[5]) {
  Vec<T> even_inner = fma(fixed<T>(inner_square), g[2], g[0]), odd_inner = fma(fixed<T>(inner_square), g[3], g[1]);
  Vec<T> even_outer = fma(fixed<T>(outer_square), g[2], g[0]), odd_outer = fma(fixed<T>(outer_square), g[3], g[1]);
  y[0] = fma(fixed<T>(inner_point), odd_inner, even_inner), y[1] = fma(fixed<T>(-inner_point), odd_inner, even_inner);
  y[2] = fma(fixed<T>(outer_point), odd_outer, even_outer), y[3] = fma(fixed<T>(-outer_point), odd_outer, even_outer);
  y[4] = g[3];
}

// At, its transpose.
template <class T>
FASTGAN_INLINE void small_of_points(const Vec<T> (&m)[5], Vec<T> (&o)[4]) {
  Vec<T> sum_inner = m[0] + m[1], sum_outer = m[2] + m[3];
  Vec<T> inner_times = fixed<T>(inner_point) * (m[0] - m[1]), outer_times = fixed<T>(outer_point) * (m[2] - m[3]);
  o[0] = sum_inner + sum_outer;
  o[1] = inner_times + outer_times;
  o[2] = fma(fixed<T>(outer_square), sum_outer, fixed<T>(inner_square) * sum_inner);
  o[3] = fma(fixed<T>(outer_square), outer_times, fma(fixed<T>(inner_square), inner_times, m[4]));
}

// G: 2 taps to 5 points.
template <class T>
FASTGAN_INLINE void points_of_weight(const Vec<T> (&w)[2], Vec<T> (&u)[5]) {
  Vec<T> last = fixed<T>(common_factor) * w[1];
  u[0] = fma(fixed<T>(common_factor / inner_point), w[0], last), u[1] = fma(fixed<T>(-common_factor / inner_point), w[0], last);
  u[2] = fma(fixed<T>(common_factor / outer_point), w[0], last), u[3] = fma(fixed<T>(-common_factor / outer_point), w[0], last);
  u[4] = w[1];
}

// Gt, its transpose.
template <class T>
FASTGAN_INLINE void weight_of_points(const Vec<T> (&u)[5], Vec<T> (&w)[2]) {
  w[0] = fma(fixed<T>(common_factor / inner_point), u[0] - u[1], fixed<T>(common_factor / outer_point) * (u[2] - u[3]));
  w[1] = fma(fixed<T>(common_factor), (u[0] + u[1]) + (u[2] + u[3]), u[4]);
}

// Applies a one-dimensional map in both dimensions: in [In][In] to out [Out][Out].
#define FASTGAN_TWO_DIMENSIONS(name, map, In, Out)                               \
  template <class T>                                                            \
  FASTGAN_INLINE void name(const Vec<T> (&in)[In][In], Vec<T> (&out)[Out][Out]) { \
    Vec<T> half[In][Out];                                                       \
    _Pragma("GCC unroll 8") for (int j = 0; j < In; j++) {                      \
      Vec<T> column[In];                                                        \
      _Pragma("GCC unroll 8") for (int i = 0; i < In; i++) column[i] = in[i][j]; \
      map<T>(column, half[j]);                                                  \
    }                                                                           \
    _Pragma("GCC unroll 8") for (int i = 0; i < Out; i++) {                     \
      Vec<T> row[In];                                                           \
      _Pragma("GCC unroll 8") for (int j = 0; j < In; j++) row[j] = half[j][i]; \
      map<T>(row, out[i]);                                                      \
    }                                                                           \
  }

FASTGAN_TWO_DIMENSIONS(large_to_points, points_of_large, 5, 5)
FASTGAN_TWO_DIMENSIONS(points_to_large, large_of_points, 5, 5)
FASTGAN_TWO_DIMENSIONS(small_to_points, points_of_small, 4, 5)
FASTGAN_TWO_DIMENSIONS(points_to_small, small_of_points, 5, 4)
FASTGAN_TWO_DIMENSIONS(weight_to_points, points_of_weight, 2, 5)
FASTGAN_TWO_DIMENSIONS(points_to_weight, weight_of_points, 5, 2)
#undef FASTGAN_TWO_DIMENSIONS

}  // namespace fastgan::cpu::FASTGAN_ISA
