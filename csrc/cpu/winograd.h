// Winograd's F(4x4, 2x2) for the four 2x2 stride-1 convolutions that a 4x4 stride-2 convolution splits into by the
// parity of its input: 25 multiplications for 4 x 4 outputs where the definition takes 64.
//
// In both dimensions the points are plus and minus first, plus and minus second, and infinity. Per dimension
//     out = At [(G w) * (Bt d)].
// Here stand the four maps that a convolution, its transpose and its weight gradient need: Bt and B on the large side
// (the input of a strided convolution), A and At on the small side, each one-dimensional and in place of nothing.
// The points decide the error: of 1,024 terms, summed in runs of 64, its RMS is 0.84 times the library's, and would be 1.9
// times with the usual points 0, 1, -1, 1/2 and infinity (docs/errors.md). Both are short binary fractions: the coefficients of
// all maps but G are exact.
#pragma once
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {

constexpr int tile = 4;  // outputs, in both dimensions
constexpr int line_points = tile + 1, winograd_points = line_points * line_points;
constexpr double first = 0.375, second = 1.25, first2 = first * first, second2 = second * second;
constexpr double common = 0.5 / (second2 - first2);  // factor of G

template <class T>
FASTGAN_INLINE Vec<T> fixed(double x) {
  return splat(static_cast<T>(x));
}

// Bt: 5 large-side values to 5 points.
template <class T>
FASTGAN_INLINE void points_of_large(const Vec<T> (&d)[5], Vec<T> (&m)[5]) {
  Vec<T> even_first = fma(fixed<T>(second2), d[1], -d[3]), odd_first = fma(fixed<T>(second2), d[0], -d[2]);
  Vec<T> even_second = fma(fixed<T>(-first2), d[1], d[3]), odd_second = fma(fixed<T>(-first2), d[0], d[2]);
  m[0] = fma(fixed<T>(first), odd_first, even_first), m[1] = fma(fixed<T>(-first), odd_first, even_first);
  m[2] = fma(fixed<T>(second), odd_second, even_second), m[3] = fma(fixed<T>(-second), odd_second, even_second);
  m[4] = fma(fixed<T>(-second2), odd_second, fma(fixed<T>(-first2), d[2], d[4]));
}

// B, its transpose.
template <class T>
FASTGAN_INLINE void large_of_points(const Vec<T> (&m)[5], Vec<T> (&x)[5]) {
  Vec<T> sum_first = m[0] + m[1], sum_second = m[2] + m[3];
  Vec<T> first_times = fixed<T>(first) * (m[0] - m[1]), second_times = fma(fixed<T>(-second2), m[4], fixed<T>(second) * (m[2] - m[3]));
  x[0] = fma(fixed<T>(second2), first_times, fixed<T>(-first2) * second_times);
  x[1] = fma(fixed<T>(second2), sum_first, fixed<T>(-first2) * sum_second);
  x[2] = fma(fixed<T>(-first2), m[4], second_times - first_times);
  x[3] = sum_second - sum_first;
  x[4] = m[4];
}

// A: 4 small-side values to 5 points.
template <class T>
FASTGAN_INLINE void points_of_small(const Vec<T> (&g)[4], Vec<T> (&y)[5]) {
  Vec<T> even_first = fma(fixed<T>(first2), g[2], g[0]), odd_first = fma(fixed<T>(first2), g[3], g[1]);
  Vec<T> even_second = fma(fixed<T>(second2), g[2], g[0]), odd_second = fma(fixed<T>(second2), g[3], g[1]);
  y[0] = fma(fixed<T>(first), odd_first, even_first), y[1] = fma(fixed<T>(-first), odd_first, even_first);
  y[2] = fma(fixed<T>(second), odd_second, even_second), y[3] = fma(fixed<T>(-second), odd_second, even_second);
  y[4] = g[3];
}

// At, its transpose.
template <class T>
FASTGAN_INLINE void small_of_points(const Vec<T> (&m)[5], Vec<T> (&o)[4]) {
  Vec<T> sum_first = m[0] + m[1], sum_second = m[2] + m[3];
  Vec<T> first_times = fixed<T>(first) * (m[0] - m[1]), second_times = fixed<T>(second) * (m[2] - m[3]);
  o[0] = sum_first + sum_second;
  o[1] = first_times + second_times;
  o[2] = fma(fixed<T>(second2), sum_second, fixed<T>(first2) * sum_first);
  o[3] = fma(fixed<T>(second2), second_times, fma(fixed<T>(first2), first_times, m[4]));
}

// G: 2 taps to 5 points.
template <class T>
FASTGAN_INLINE void points_of_weight(const Vec<T> (&w)[2], Vec<T> (&u)[5]) {
  Vec<T> last = fixed<T>(common) * w[1];
  u[0] = fma(fixed<T>(common / first), w[0], last), u[1] = fma(fixed<T>(-common / first), w[0], last);
  u[2] = fma(fixed<T>(common / second), w[0], last), u[3] = fma(fixed<T>(-common / second), w[0], last);
  u[4] = w[1];
}

// Gt, its transpose.
template <class T>
FASTGAN_INLINE void weight_of_points(const Vec<T> (&u)[5], Vec<T> (&w)[2]) {
  w[0] = fma(fixed<T>(common / first), u[0] - u[1], fixed<T>(common / second) * (u[2] - u[3]));
  w[1] = fma(fixed<T>(common), (u[0] + u[1]) + (u[2] + u[3]), u[4]);
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
