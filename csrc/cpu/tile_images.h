// Working copies of images, in bf16 or three parts of it, as operands of AMX products. The rows of a tile stand one after the
// other, so that a tile is sixteen cache lines in turn: the pixels of a row of the result, of several small images side by side.
// So copies keep channels in blocks of a line, interleave images, pixel by pixel, and a large side has its even and odd columns
// apart, as a convolution of stride 2 reads either.
//   small  [parts][blocks][H + 2][W + 2][images][line]
//   large  [parts][blocks][2 H + 2][2 parities][W + 1][images][line]
// Zeros surround either; they come after the prologue by construction. A weight's gradient sums over pixels, two by two: the
// two are the same pixel of two images, one Pair.
#pragma once
#include "cpu/amx.h"
#include "cpu/taps.h"
#include "cpu/views.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

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
template <class Unit>
constexpr int64_t lines(int64_t channels) {
  return (channels + line<Unit> - 1) / line<Unit>;
}

// The images of one unit: of a Pair, the second may be missing and is 0.
template <class Unit, class S>
struct Images {
  Source<float, S> source[images_of<Unit>];
  int64_t at[images_of<Unit>];
  bool both;

  Images(const Source<float, S>& s, int64_t first, int64_t N, int64_t size, int64_t C) : both(first + 1 < N) {
    for (int i = 0; i < images_of<Unit>; i++) source[i] = of_image(s, first + i, C), at[i] = (first + i) * size;
  }

  template <Operand kind>
  FASTGAN_INLINE Vec<float> value(int image, int64_t offset, int64_t C, int64_t c, int64_t n) const {
    return operand<float, kind>(source[image], C, at[image] + offset + c, c, n);
  }
  template <Operand kind>
  FASTGAN_INLINE void pairs(int64_t offset, int64_t C, int64_t c, int64_t n, Parts<S>& pair) const {
    Parts<S> first, second;
    split<S>(value<kind>(0, offset, C, c, n), first), split<S>(both ? value<kind>(1, offset, C, c, n) : Vec<float>{}, second);
    FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) pair[p] = paired(first[p], second[p]);
  }

  // `pixels` pixels from `offset` in the image on, `step` apart, to `to`, to_step apart: channels from `c` to `end`, in blocks and
  // parts, 0 from C on.
  template <Operand kind>
  void copy(int64_t offset, int64_t step, int64_t pixels, int64_t C, int64_t c, int64_t end, Unit* to, int64_t to_step,
            int64_t to_block, int64_t to_part) const {
    for (; c < end; c += line<Unit>, to += to_block) {
      for (int64_t half = 0; half < line<Unit>; half += lanes<float>) {
        int64_t n = std::clamp<int64_t>(C - c - half, 0, lanes<float>);
        for (int64_t i = 0; i < pixels; i++) {
          Parts<S> part;
          Unit* at = to + i * to_step + half;
          if constexpr (images_of<Unit> == 1) {
            split<S>(n ? value<kind>(0, offset + i * step, C, c + half, n) : Vec<float>{}, part);
            FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) store(at + p * to_part, part[p]);
          } else {
            pairs<kind>(offset + i * step, C, c + half, n, part);
            FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) std::memcpy(at + p * to_part, &part[p], sizeof part[p]);
          }
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
template <class Unit, class S>
struct Copy {
  int64_t N, H, W, C, units, rows, planes, columns;  // units: side by side

  int64_t pixel() const { return units * line<Unit>; }
  int64_t row() const { return planes * columns * pixel(); }
  int64_t block() const { return rows * row(); }
  int64_t blocks() const { return lines<Unit>(C); }
  // Of the first unit's pixel in the padded column x of the padded row y.
  int64_t offset(int64_t y, int64_t x) const { return y * row() + (x % planes * columns + x / planes) * pixel(); }

  // The images from `first` on, `count_blocks` blocks from `from` on; units that the batch has not become 0.
  void read(const Source<float, S>& source, int64_t first, int64_t from, int64_t count_blocks, Unit* copy) const {
    int64_t count = std::min(units, (N - first + images_of<Unit> - 1) / images_of<Unit>), part = count_blocks * block();
    for (Unit* b = copy; b < copy + parts<S> * part; b += block()) {
      std::fill_n(b, row(), Unit{});
      std::fill_n(b + (H + 1) * row(), (rows - H - 1) * row(), Unit{});
      for (int64_t y = 1; y <= H; y++) {
        if (count < units) std::fill_n(b + y * row(), row(), Unit{});
        for (int64_t x = 0; x < planes * columns; x = x == 0 ? W + 1 : x + 1) std::fill_n(b + offset(y, x), pixel(), Unit{});
      }
    }
    with_kind(source.kind, [&](auto kind) {
      for (int64_t i = 0; i < count; i++) {
        Images<Unit, S> images(source, first + i * images_of<Unit>, N, H * W * C, C);
        for (int64_t y = 1; y <= H; y++) {
          for (int64_t x = 1; x <= std::min(planes, W); x++) {
            images.template copy<kind()>(((y - 1) * W + x - 1) * C, planes * C, (W - x + planes) / planes, C, from * line<Unit>,
                                         (from + count_blocks) * line<Unit>, copy + offset(y, x) + i * line<Unit>, pixel(), block(),
                                         part);
          }
        }
      }
    });
  }
};

// The large side of few channels: each pixel of the small side with the values (tap, channel) that it meets, in blocks.
template <class Unit>
struct Unrolled {
  // In fp32 thin.h is faster.
  template <class S>
  bool serves() const {
    return parts<S> == 1 && s.C <= thin_channels;
  }
  Sizes s;
  int64_t units;

  int64_t depth() const { return taps * s.C; }
  int64_t row() const { return s.W * units * line<Unit>; }
  int64_t block() const { return s.H * row(); }
  int64_t blocks() const { return lines<Unit>(depth()); }

  void read(const Source<float, bfloat16>& source, int64_t first, Unit* copy) const {
    int64_t count = std::min(units * images_of<Unit>, s.N - first);
    if (count < units * images_of<Unit>) std::fill_n(copy, blocks() * block(), Unit{});
    Frame frame{2 * s.H + 2, 2 * s.W + 2, s.C, 1};
    bfloat16* padded = scratch<bfloat16>(Scratch::image, frame.size());
    for (int64_t i = 0; i < count; i++) {
      read_image(source, first + i, s.LH, s.LW, s.C, frame, padded);
      Unit* to = copy + i / images_of<Unit> * line<Unit>;
      switch (s.C) {
        case 1: patches<1>(padded, frame.columns, i % images_of<Unit>, to); break;
        case 2: patches<2>(padded, frame.columns, i % images_of<Unit>, to); break;
        case 3: patches<3>(padded, frame.columns, i % images_of<Unit>, to); break;
        default: patches<thin_channels>(padded, frame.columns, i % images_of<Unit>, to);
      }
    }
  }

  // Of the `which`-th image of a unit.
  template <int C>
  void patches(const bfloat16* padded, int64_t columns, int64_t which, Unit* to) const {
    constexpr int64_t blocks = lines<Unit>(taps * C), reach = 4 * C;
    bfloat16 patch[blocks * line<Unit>] = {};
    for (int64_t y = 0; y < s.H; y++) {
      for (int64_t x = 0; x < s.W; x++, to += units * line<Unit>) {
        for (int ky = 0; ky < 4; ky++) std::memcpy(patch + ky * reach, padded + ((2 * y + ky) * columns + 2 * x) * C, 2 * reach);
        for (int64_t b = 0; b < blocks; b++) {
          Unit* row = to + b * block();
          if constexpr (images_of<Unit> == 1) {
            std::memcpy(row, patch + b * line<Unit>, 64);
          } else {
            Vec<float> half = load(patch + b * line<Unit>);  // which stands above zeros
            __m512i pairs = which == 0 ? _mm512_srli_epi32(__m512i(half), 16) : _mm512_or_si512(_mm512_loadu_si512(row), __m512i(half));
            std::memcpy(row, &pairs, sizeof pairs);
          }
        }
      }
    }
  }
};

// The small side with its pixels along the rows of tiles, [parts][blocks of 16 channels][rows of pixels][tiles of a row]
// [16 channels][16 pixels]: a row holds those of `units` pairs of images side by side, then zeros.
template <class S>
struct Transposed {
  int64_t N, H, W, C, units;

  int64_t row_tiles() const { return (W * units + tile_rows - 1) / tile_rows; }
  int64_t tiles() const { return H * row_tiles(); }  // of a group of images and a block
  int64_t blocks() const { return (C + tile_rows - 1) / tile_rows; }
  static constexpr int64_t tile_size = tile_rows * tile_rows;

  // One group, whose first image is `first`, to its place in `copy`, where blocks are `block` apart.
  void read(const Source<float, S>& source, int64_t first, Pair* copy, int64_t block) const {
    with_kind(source.kind, [&](auto kind) {
      for (int64_t c = 0; c < C; c += lanes<float>, copy += block) {
        int64_t n = std::min<int64_t>(C - c, lanes<float>);
        Pair* to = copy;
        for (int64_t y = 0; y < H; y++) {
          for (int64_t tile = 0; tile < row_tiles(); tile++) {
            Vec<float> rows[parts<S>][lanes<float>];
            for (int i = 0; i < lanes<float>; i++) {
              int64_t x = (tile * tile_rows + i) / units, image = first + (tile * tile_rows + i) % units * 2;
              Parts<S> part = {};
              if (x < W && image < N) {
                Images<Pair, S>(source, image, N, H * W * C, C).template pairs<kind()>((y * W + x) * C, C, c, n, part);
              }
              FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) rows[p][i] = part[p];
            }
            FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) {
              transpose(rows[p]);
              std::memcpy(to + p * blocks() * block, rows[p], sizeof rows[p]);
            }
            to += tile_size;
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
