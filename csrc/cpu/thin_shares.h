// To a large side of few channels by the definition, where a register holds four pixels of it: one product gives each pixel of
// the small side its share of all pixels that it reaches, [ky][kx][c], and where shares meet they are added, those in a row of the
// image as one register. (thin_squares.h multiplies a third less, but would leave a quarter of each register empty and
// transform what this reads in place.)
#pragma once
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/thin.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <class T>
struct ThinToLarge {
  static_assert(4 * thin_channels <= lanes<T>);
  Thin<T> thin;
  Sizes s;
  int64_t registers, width;  // of a pixel's shares

  explicit ThinToLarge(const Sizes& s) : thin(s), s(s), registers(taps * s.C / lanes<T>), width(taps * s.C) {}

  template <class S>
  void to_large(const Source<T, S>& source, const Filters<const T>& weight, const Sink<T, S>& sink) const {
    T* u = scratch<T>(Scratch::weight, s.K * width);
    weight_to_columns(weight, u);
    const Frame& frame = thin.scheme.large;
    int64_t rows = std::min(s.H, (micro_rows<2> + s.W - 1) / s.W), row = s.W * width;  // at once, as many as a tile has
    parallel(s.N, [&](int64_t image) {
      T* large = scratch<T>(Scratch::image, frame.size() + lanes<T>);
      T* shares = scratch<T>(Scratch::sums, (2 * rows + 1) * row + lanes<T>);
      T *other = shares + rows * row, *nothing = other + rows * row;
      std::fill_n(nothing, row, T(0));
      const T* above = nothing;
      for (int64_t y = 0; y <= s.H; y += rows, std::swap(shares, other)) {
        int64_t count = std::min(rows, s.H - y);
        if (count > 0) {
          int64_t pixels = count * s.W;
          const T* small = thin.read_small_rows(source, image, y, count);
          Stream ahead{reinterpret_cast<const char*>(source.a + thin.small_row(image, y + count)), sizeof(S)};
          switch (s.C) {
            case 1: multiply<1>(small, u, pixels, shares, ahead); break;
            case 3: multiply<3>(small, u, pixels, shares, ahead); break;
            default: multiply<2>(small, u, pixels, shares, ahead);
          }
        }
        for (int64_t r = 0; r < std::min(rows, s.H + 1 - y); r++) {
          const T* below = r < count ? shares + r * row : nothing;
          add_shares(above, below, large + 2 * (y + r) * thin.line);
          above = below;
        }
      }
      write_image(sink, image, s.LH, s.LW, s.C, frame, large);
    });
  }

  // To u [tiles][K][tile].
  void weight_to_columns(const Filters<const T>& weight, T* u) const {
    int64_t tile = (registers == 4 ? 2 : registers) * lanes<T>;
    T columns[taps * thin_channels];
    for (int64_t k = 0; k < s.K; k++) {
      for (int64_t c = 0; c < s.C; c++) {
        for (int64_t tap = 0; tap < taps; tap++) columns[tap * s.C + c] = *weight.at(k, c, tap);
      }
      for (int64_t j = 0; j < width; j += tile) std::copy_n(columns + j, tile, u + j * s.K + k * tile);
    }
  }

  template <int V>
  void multiply(const T* small, const T* u, int64_t pixels, T* shares, const Stream& ahead) const {
    constexpr int64_t tile = V * lanes<T>;
    multiply_rows<T, V>(small, RowStrides{thin.columns, run_length, run_length}, u, s.K * tile, s.K, run_length, shares, width,
                        tile, registers / V, pixels, false, ahead);
  }

  // Two rows of the padded image, of what the rows of the small side above and below them give. What a register writes too far,
  // the next one overwrites.
  void add_shares(const T* above, const T* below, T* to) const {
    const int64_t reach = 4 * s.C, pair = 2 * s.C, width = this->width;
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i next = _mm512_add_epi32(lane, _mm512_set1_epi32(pair));
    for (int64_t i = 0; i < 2; i++, above += reach, below += reach, to += thin.line) {
      const T *upper = above + 2 * reach, *lower = below;
      T* out = to;
      Vec<T> left{};
      for (int64_t x = 0; x < s.W; x++, upper += width, lower += width, out += pair) {
        Vec<T> share = load(upper) + load(lower);
        store(out, left + share);
        left = _mm512_permutexvar_ps(next, share);
      }
      store(out, left);
    }
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
