// Working copies of images in bf16 as operands of AMX products, where the rows of a tile must stand at equal distances: the
// pixels of a row of the result, of several small images side by side. So copies interleave images, pixel by pixel, and a
// large side keeps its even and odd columns apart, as a convolution of stride 2 reads either.
//   small  [H + 2][W + 2][images][channels]
//   large  [2 H + 2][2 parities][W + 1][images][channels]
// Zeros surround either; they come after the prologue by construction. A weight's gradient sums over pixels, two by two: the
// two are the same pixel of two images, one Pair.
#pragma once
#include "cpu/amx.h"
#include "cpu/taps.h"
#include "cpu/views.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

using HalfSource = Source<float, bfloat16>;

// The fewest images whose rows of W pixels fill at least seven eighths of the tiles that hold them, if any do; all N may be fewer.
inline int64_t images_together(int64_t N, int64_t W) {
  int64_t best = 1;
  double most = 0;
  for (int64_t count = 1; count <= std::min<int64_t>(N, tile_rows); count++) {
    int64_t pixels = count * W;
    double share = static_cast<double>(pixels) / ((pixels + tile_rows - 1) / tile_rows * tile_rows);
    if (share > most) best = count, most = share;
    if (share >= 0.875) break;
  }
  return best;
}

// The same channel of two images.
struct Pair {
  bfloat16 of[2];
};
template <class Unit>
constexpr int64_t images_of = sizeof(Unit) / sizeof(bfloat16);
template <class Unit>
constexpr int64_t line = 64 / sizeof(Unit);  // channels of a cache line, which is a row of a tile

// Channels of a copy: an odd number of cache lines, for lines a power of two apart share few places in a cache.
template <class Unit>
constexpr int64_t odd_lines(int64_t channels) {
  return ((channels + line<Unit> - 1) / line<Unit> | 1) * line<Unit>;
}

// The images of one unit: of a Pair, the second may be missing and is 0.
template <class Unit>
struct Images {
  HalfSource source[images_of<Unit>];
  int64_t at[images_of<Unit>];
  bool both;

  Images(const HalfSource& s, int64_t first, int64_t N, int64_t size, int64_t C) : both(first + 1 < N) {
    for (int i = 0; i < images_of<Unit>; i++) source[i] = of_image(s, first + i, C), at[i] = (first + i) * size;
  }

  template <Operand kind>
  FASTGAN_INLINE Vec<float> value(int image, int64_t offset, int64_t C, int64_t c, int64_t n) const {
    return operand<float, kind>(source[image], C, at[image] + offset + c, c, n);
  }
  template <Operand kind>
  FASTGAN_INLINE Vec<float> pair(int64_t offset, int64_t C, int64_t c, int64_t n) const {
    return paired(value<kind>(0, offset, C, c, n), both ? value<kind>(1, offset, C, c, n) : Vec<float>{});
  }

  // `pixels` pixels from `offset` in the image on, `step` apart, to `to`, to_step apart: channels in whole lines, 0 from C on.
  template <Operand kind>
  void copy(int64_t offset, int64_t step, int64_t pixels, int64_t C, Unit* to, int64_t to_step) const {
    for (int64_t c = 0; c < (C + line<Unit> - 1) / line<Unit> * line<Unit>; c += lanes<float>) {
      int64_t n = std::clamp<int64_t>(C - c, 0, lanes<float>);
      for (int64_t i = 0; i < pixels; i++) {
        if constexpr (images_of<Unit> == 1) {
          store(to + i * to_step + c, n ? value<kind>(0, offset + i * step, C, c, n) : Vec<float>{});
        } else {
          Vec<float> pairs = pair<kind>(offset + i * step, C, c, n);
          std::memcpy(to + i * to_step + c, &pairs, sizeof pairs);
        }
      }
    }
  }
};

template <class F>
FASTGAN_INLINE void with_kind(Operand kind, const F& f) {
  switch (kind) {
    case Operand::activation: return f(std::integral_constant<Operand, Operand::activation>());
    case Operand::gradient: return f(std::integral_constant<Operand, Operand::gradient>());
    case Operand::plain: return f(std::integral_constant<Operand, Operand::plain>());
  }
}

// A copy of a side of H x W pixels, its columns by parity or not: `planes` of `columns` columns in each of `rows` rows.
template <class Unit>
struct Copy {
  int64_t N, H, W, C, units, rows, planes, columns, channels;  // units: side by side

  Copy(int64_t N, int64_t H, int64_t W, int64_t C, int64_t units, int64_t rows, int64_t planes, int64_t columns)
      : N(N), H(H), W(W), C(C), units(units), rows(rows), planes(planes), columns(columns), channels(odd_lines<Unit>(C)) {}

  int64_t pixel() const { return units * channels; }
  int64_t plane() const { return columns * pixel(); }
  int64_t size() const { return rows * planes * plane(); }
  // Of the first unit's pixel in the padded column x of the padded row y.
  int64_t offset(int64_t y, int64_t x) const { return (y * planes + x % planes) * plane() + x / planes * pixel(); }

  // The images from `first` on; units that the batch has not become 0.
  void read(const HalfSource& source, int64_t first, Unit* copy) const {
    int64_t row = planes * plane(), count = std::min(units, (N - first + images_of<Unit> - 1) / images_of<Unit>);
    std::fill_n(copy, row, Unit{});
    std::fill_n(copy + (H + 1) * row, (rows - H - 1) * row, Unit{});
    if (count < units) std::fill_n(copy + row, H * row, Unit{});
    with_kind(source.kind, [&](auto kind) {
      for (int64_t i = 0; i < count; i++) {
        Images<Unit> images(source, first + i * images_of<Unit>, N, H * W * C, C);
        for (int64_t y = 1; y <= H; y++) {
          for (int64_t x = 1; x <= std::min(planes, W); x++) {
            images.template copy<kind()>(((y - 1) * W + x - 1) * C, planes * C, (W - x + planes) / planes, C,
                                         copy + offset(y, x) + i * channels, pixel());
          }
        }
      }
    });
    for (int64_t y = 1; y <= H; y++) {
      for (int64_t x = 0; x < planes * columns; x = x == 0 ? W + 1 : x + 1) std::fill_n(copy + offset(y, x), pixel(), Unit{});
    }
  }
};

// The large side of few channels: each pixel of the small side with the values (tap, channel) that it meets.
template <class Unit>
struct Unrolled {
  Sizes s;
  int64_t units, channels;
  Frame frame;

  Unrolled(const Sizes& s, int64_t units)
      : s(s), units(units), channels(odd_lines<Unit>(taps * s.C)), frame{2 * s.H + 2, 2 * s.W + 2, s.C, 1} {}

  int64_t pixel() const { return units * channels; }
  int64_t size() const { return s.H * s.W * pixel(); }

  void read(const HalfSource& source, int64_t first, Unit* copy) const {
    std::fill_n(copy, size(), Unit{});
    int64_t count = std::min(units * images_of<Unit>, s.N - first), depth = taps * s.C;
    bfloat16* padded = scratch<bfloat16>(Scratch::image, frame.size());
    for (int64_t i = 0; i < count; i++) {
      read_image(source, first + i, s.LH, s.LW, s.C, frame, padded);
      int64_t row = frame.columns * s.C, reach = 4 * s.C;
      Unit* to = copy + i / images_of<Unit> * channels;
      for (int64_t y = 0; y < s.H; y++) {
        for (int64_t x = 0; x < s.W; x++, to += pixel()) {
          const bfloat16* corner = padded + 2 * y * row + 2 * x * s.C;
          if constexpr (images_of<Unit> == 1) {
            for (int ky = 0; ky < 4; ky++) std::memcpy(to + ky * reach, corner + ky * row, reach * sizeof(bfloat16));
          } else {
            for (int64_t d = 0; d < depth; d++) to[d].of[i % 2] = corner[d / reach * row + d % reach];
          }
        }
      }
    }
  }
};

// The small side with its pixels along rows, [channels][groups][H][pixels of a row], in whole tiles: a row holds those of
// `units` pairs of images side by side, then zeros.
struct Transposed {
  int64_t N, H, W, C, units, row, stride;

  Transposed(int64_t N, int64_t H, int64_t W, int64_t C, int64_t units, int64_t groups)
      : N(N), H(H), W(W), C(C), units(units), row((W * units + tile_rows - 1) / tile_rows * tile_rows), stride(odd_lines<Pair>(groups * H * row)) {}

  int64_t size() const { return (C + tile_rows - 1) / tile_rows * tile_rows * stride; }

  // Rows of one group, whose first image is `first`, to its place in `copy`.
  void read(const HalfSource& source, int64_t first, Pair* copy) const {
    with_kind(source.kind, [&](auto kind) {
      for (int64_t y = 0; y < H; y++) {
        for (int64_t pixel = 0; pixel < row; pixel += tile_rows) {
          for (int64_t c = 0; c < C; c += lanes<float>) {
            int64_t n = std::min<int64_t>(C - c, lanes<float>);
            Vec<float> rows[lanes<float>];
            for (int i = 0; i < lanes<float>; i++) {
              int64_t x = (pixel + i) / units, image = first + (pixel + i) % units * 2;
              bool missing = x >= W || image >= N;
              rows[i] = missing ? Vec<float>{} : Images<Pair>(source, image, N, H * W * C, C).template pair<kind()>((y * W + x) * C, C, c, n);
            }
            transpose(rows);
            for (int i = 0; i < lanes<float>; i++) {
              std::memcpy(copy + (c + i) * stride + y * row + pixel, &rows[i], sizeof rows[i]);
            }
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
