// The two ways a 4x4 stride-2 padding-1 convolution becomes products of matrices in panel layout; two more, thin.h and
// polyphase.h, read images in place. All have a large side [N, LH, LW, C] and a small side [N, H, W, K], joined by a weight
// [K, C, 4, 4]: a convolution maps large to small, a transposed convolution or an input gradient small to large, and a
// weight gradient both to the weight.
//
// A scheme turns a tile of either side into `points` rows of a product's operand and back (the transposed map), and the
// weight into the other operand. Depth on the large side is groups * phases panels, on the small side `small_panels`.
//   operands     large V [points][groups][phases][stride][panel],  small Y [points][small_panels][stride][panel], points
//                `point_stride` apart, where stride is the number of tiles made odd: panels a power of two apart would
//                share one set of the cache
//   weights      of some panels of the result and some of the depth: each point [panels][depth][panel]
#pragma once
#include <vector>

#include "cpu/block.h"
#include "cpu/gemm.h"
#include "cpu/taps.h"
#include "cpu/views.h"
#include "cpu/winograd.h"

namespace fastgan::cpu::FASTGAN_ISA {

template <class T>
struct Winograd {
  static constexpr int points = winograd_points, phases = 4;
  int64_t C, K, groups, small_panels, tiles_y, tiles_x;
  Frame large, small;

  explicit Winograd(const Sizes& s)
      : C(s.C),
        K(s.K),
        groups(panels<T>(s.C)),
        small_panels(panels<T>(s.K)),
        tiles_y((s.H + tile - 1) / tile),
        tiles_x((s.W + tile - 1) / tile),
        large{2 * tile * tiles_y + 2, 2 * tile * tiles_x + 2, groups * panel<T>, 1},
        small{tile * tiles_y, tile * tiles_x, small_panels * panel<T>, 0} {}

  int64_t tiles() const { return tiles_y * tiles_x; }

  // Calls f(image, operand): pointers to one lane group of one tile in the padded image and in the operand. Of a panel all tiles
  // follow one another, so that each point is written, or read, on and on: processors foresee so many streams and no more.
  template <class Image, class Operand, class F>
  FASTGAN_INLINE void for_tiles(const Frame& frame, int64_t pixels, Image* image, Operand* operand, int64_t step, int64_t groups,
                                F f) const {
    for (int64_t g = 0; g < groups; g++) {
      Operand* o = operand + g * step;
      for (int64_t i = 0; i < tiles_y; i++) {
        Image* x = image + i * pixels * frame.columns * frame.channels + g * panel<T>;
        for (int64_t j = 0; j < tiles_x; j++, o += panel<T>, x += pixels * frame.channels) {
          for (int half = 0; half < panel<T>; half += lanes<T>) f(x + half, o + half);
        }
      }
    }
  }

  // `operand` stands at the image's first tile.
  void large_to_operand(const T* image, T* operand, int64_t stride) const {
    int64_t line = large.columns * large.channels, step = large.channels, point = point_stride<T>(phases * groups, stride);
    for (int phase = 0; phase < phases; phase++) {
      for_tiles(large, 2 * tile, image + phase / 2 * line + phase % 2 * step, operand + phase * stride * panel<T>,
                phases * stride * panel<T>, groups, [&](const T* d, T* v) {
        Vec<T> value[line_points][line_points], transformed[line_points][line_points];
        for (int i = 0; i < line_points; i++) {
          for (int j = 0; j < line_points; j++) value[i][j] = load(d + 2 * i * line + 2 * j * step);
        }
        large_to_points<T>(value, transformed);
        FASTGAN_UNROLL for (int p = 0; p < points; p++) store(v + p * point, transformed[p / line_points][p % line_points]);
      });
    }
  }

  // Neighbouring tiles share a column of the image, which registers carry, and a row, which is added in memory.
  void operand_to_large(const T* operand, T* image, int64_t stride) const {
    int64_t line = large.columns * large.channels, step = large.channels, point = point_stride<T>(phases * groups, stride);
    for (int64_t g = 0; g < groups * phases; g++) {
      for (int64_t i = 0; i < tiles_y; i++) {
        int64_t phase = g % phases;
        for (int half = 0; half < panel<T>; half += lanes<T>) {
          const T* m = operand + (g * stride + i * tiles_x) * panel<T> + half;
          T* x = image + (2 * tile * i + phase / 2) * line + phase % 2 * step + g / phases * panel<T> + half;
          Vec<T> carry[line_points] = {};
          for (int64_t j = 0; j < tiles_x; j++, m += panel<T>, x += 2 * tile * step) {
            Vec<T> value[line_points][line_points], transformed[line_points][line_points];
            FASTGAN_UNROLL for (int p = 0; p < points; p++) value[p / line_points][p % line_points] = load(m + p * point);
            points_to_large<T>(value, transformed);
            FASTGAN_UNROLL for (int k = 0; k < line_points; k++) {
              transformed[k][0] += carry[k], carry[k] = transformed[k][tile];
              T* to = x + 2 * k * line;
              FASTGAN_UNROLL for (int l = 0; l < tile; l++) {
                if (k == 0 && i > 0) transformed[k][l] += load(to + 2 * l * step);
                store(to + 2 * l * step, transformed[k][l]);
              }
            }
          }
          FASTGAN_UNROLL for (int k = 0; k < line_points; k++) {
            T* to = x + 2 * k * line;
            if (k == 0 && i > 0) carry[k] += load(to);
            store(to, carry[k]);
          }
        }
      }
    }
  }

  void small_to_operand(const T* image, T* operand, int64_t stride) const {
    int64_t line = small.columns * small.channels, step = small.channels, point = point_stride<T>(small_panels, stride);
    for_tiles(small, tile, image, operand, stride * panel<T>, small_panels, [&](const T* in, T* out) {
      Vec<T> value[tile][tile], transformed[line_points][line_points];
      for (int i = 0; i < tile; i++) {
        for (int j = 0; j < tile; j++) value[i][j] = load(in + i * line + j * step);
      }
      small_to_points<T>(value, transformed);
      FASTGAN_UNROLL for (int p = 0; p < points; p++) store(out + p * point, transformed[p / line_points][p % line_points]);
    });
  }

  void operand_to_small(const T* operand, T* image, int64_t stride) const {
    int64_t line = small.columns * small.channels, step = small.channels, point = point_stride<T>(small_panels, stride);
    for_tiles(small, tile, image, operand, stride * panel<T>, small_panels, [&](T* out, const T* in) {
      Vec<T> value[line_points][line_points], transformed[tile][tile];
      FASTGAN_UNROLL for (int p = 0; p < points; p++) value[p / line_points][p % line_points] = load(in + p * point);
      points_to_small<T>(value, transformed);
      for (int i = 0; i < tile; i++) {
        for (int j = 0; j < tile; j++) store(out + i * line + j * step, transformed[i][j]);
      }
    });
  }

  // The transformed weight for panels first .. last of the small side, and of the operand's depth `count` from `from` on, of
  // whole groups: each point [panels][count][panel], points `point` apart. Phase by phase, for each phase writes to all points.
  void weight_to_small(const Filters<const T>& weight, int64_t first, int64_t last, int64_t from, int64_t count, T* out,
                       int64_t point) const {
    for (int64_t kp = first; kp < last; kp++, out += count * panel<T>) {
      for (int64_t d = 0; d < count; d += phases * panel<T>) {
        for (int64_t i = 0; i < panel<T> * panel<T>; i += lanes<T> * lanes<T>) {
          int64_t half = i / lanes<T> % panel<T>, column = i / lanes<T> / panel<T> * lanes<T>;
          FilterBlock<T> block;
          load_block(weight, kp * panel<T> + half, (from + d) / phases + column, block);
          int64_t next = half ? kp * panel<T> : kp * panel<T> + lanes<T>, next_column = (from + d) / phases + column + (half ? lanes<T> : 0);
          FASTGAN_UNROLL for (int phase = 0; phase < phases; phase++) {
            for (int j = 0; j < lanes<T>; j++) {
              if (j % phases == phase) prefetch_taps(weight, next + j, next_column);
              transform_taps(block[j], phase, out + (d + phase * panel<T> + column + j) * panel<T> + half, point);
            }
          }
        }
      }
    }
  }

  // The same for panels (panel of C, phase) of the large side.
  void weight_to_large(const Filters<const T>& weight, int64_t first, int64_t last, int64_t from, int64_t count, T* out,
                       int64_t point) const {
    constexpr int64_t most = 8;  // rows of the depth that the first-level cache holds beside what is written
    for (int64_t o = first, end; o < last; out += (end - o) * count * panel<T>, o = end) {
      int64_t cp = o / phases;
      end = std::min((cp + 1) * phases, last);
      for (int64_t some = 0; some < count; some += most) {
        constexpr int halves = panel<T> / lanes<T>;
        Vec<T> tap[most][halves][taps];
        int64_t rows = std::min(most, count - some);
        for (int64_t k = 0; k < rows; k++) {
          for (int half = 0; half < halves; half++) {
            prefetch_taps(weight, from + some + k + 2, cp * panel<T> + half * lanes<T>);
            load_taps(weight, from + some + k, cp * panel<T> + half * lanes<T>, tap[k][half]);
          }
        }
        FASTGAN_UNROLL for (int phase = 0; phase < phases; phase++) {
          int64_t p = cp * phases + phase;
          if (p < o || p >= end) continue;
          T* to = out + ((p - o) * count + some) * panel<T>;
          for (int64_t k = 0; k < rows; k++) {
            for (int half = 0; half < halves; half++) transform_taps(tap[k][half], phase, to + k * panel<T> + half * lanes<T>, point);
          }
        }
      }
    }
  }

  FASTGAN_INLINE static void transform_taps(const Vec<T> (&tap)[taps], int phase, T* to, int64_t point) {
    Vec<T> w[2][2], u[line_points][line_points];
    for (int i = 0; i < 2; i++) {
      for (int j = 0; j < 2; j++) w[i][j] = tap[(2 * i + phase / 2) * 4 + 2 * j + phase % 2];
    }
    weight_to_points<T>(w, u);
    FASTGAN_UNROLL for (int p = 0; p < points; p++) store(to + p * point, u[p / line_points][p % line_points]);
  }

  // blocks [points][phases][panel of C][panel of K], for one group of C and one panel of K, to the weight's gradient.
  void blocks_to_weight(const T* blocks, int64_t group, int64_t kp, const Filters<T>& weight) const {
    for (int64_t i = 0; i < panel<T> * panel<T>; i += lanes<T> * lanes<T>) {
      int64_t half = i / lanes<T> % panel<T>, column = i / lanes<T> / panel<T> * lanes<T>;
      FilterBlock<T> block;
      for (int j = 0; j < lanes<T>; j++) {
        prefetch_taps(weight, kp * panel<T> + half + j, group * panel<T> + column);
        for (int phase = 0; phase < phases; phase++) {
          Vec<T> u[line_points][line_points], w[2][2];
          FASTGAN_UNROLL for (int p = 0; p < points; p++) {
            u[p / line_points][p % line_points] = load(blocks + ((p * phases + phase) * panel<T> + column + j) * panel<T> + half);
          }
          points_to_weight<T>(u, w);
          for (int q = 0; q < 4; q++) block[j][(2 * (q / 2) + phase / 2) * 4 + 2 * (q % 2) + phase % 2] = w[q / 2][q % 2];
        }
      }
      store_block(weight, kp * panel<T> + half, group * panel<T> + column, block);
    }
  }
};

// The definition as a matrix product (im2col), to the small side and to the weight: where Winograd's transforms cost more
// than they save, or too much of its error stays. Depth on the large side is (ky, kx, c); a tile is one pixel.
template <class T>
struct Direct {
  static constexpr int points = 1, phases = 1;
  int64_t C, K, groups, small_panels, H, W;
  Frame large, small;

  explicit Direct(const Sizes& s)
      : C(s.C),
        K(s.K),
        groups(panels<T>(taps * s.C)),
        small_panels(panels<T>(s.K)),
        H(s.H),
        W(s.W),
        large{2 * s.H + 2, 2 * s.W + 2, s.C, 1},
        small{s.H, s.W, small_panels * panel<T>, 0} {}

  int64_t tiles() const { return H * W; }

  void large_to_operand(const T* image, T* operand, int64_t stride) const {
    int64_t line = large.columns * C;
    std::vector<T> patch(groups * panel<T>);
    for (int64_t pixel = 0; pixel < H * W; pixel++, operand += panel<T>) {
      const T* corner = image + 2 * (pixel / W) * line + 2 * (pixel % W) * C;
      for (int y = 0; y < 4; y++) std::copy_n(corner + y * line, 4 * C, patch.data() + y * 4 * C);
      for (int64_t g = 0; g < groups; g++) std::copy_n(patch.data() + g * panel<T>, panel<T>, operand + g * stride * panel<T>);
    }
  }

  void small_to_operand(const T* image, T* operand, int64_t stride) const {
    for (int64_t pixel = 0; pixel < H * W; pixel++) {
      for (int64_t g = 0; g < small_panels; g++) {
        std::copy_n(image + (pixel * small_panels + g) * panel<T>, panel<T>, operand + (g * stride + pixel) * panel<T>);
      }
    }
  }

  void operand_to_small(const T* operand, T* image, int64_t stride) const {
    for (int64_t pixel = 0; pixel < H * W; pixel++) {
      for (int64_t g = 0; g < small_panels; g++) {
        std::copy_n(operand + (g * stride + pixel) * panel<T>, panel<T>, image + (pixel * small_panels + g) * panel<T>);
      }
    }
  }

  void weight_to_small(const Filters<const T>& weight, int64_t first, int64_t last, int64_t from, int64_t count, T* out, int64_t) const {
    std::fill_n(out, (last - first) * count * panel<T>, T(0));
    int64_t end = std::min(from + count, taps * C);
    for (int64_t kp = first; kp < last; kp++, out += count * panel<T>) {
      for (int64_t i = 0; i < panel<T> && kp * panel<T> + i < K; i++) {
        T* to = out + i;
        for (int64_t d = from, tap = from / C, c = from % C; d < end; d++, to += panel<T>) {
          *to = *weight.at(kp * panel<T> + i, c, tap);
          if (++c == C) c = 0, tap++;
        }
      }
    }
  }

  void blocks_to_weight(const T* blocks, int64_t group, int64_t kp, const Filters<T>& weight) const {
    for (int64_t row = 0; row < panel<T>; row++) {
      int64_t tap = (group * panel<T> + row) / C, c = (group * panel<T> + row) % C;
      for (int64_t k = kp * panel<T>, i = 0; tap < taps && k < K && i < panel<T>; k++, i++) {
        *weight.at(k, c, tap) = blocks[row * panel<T> + i];
      }
    }
  }
};

}  // namespace fastgan::cpu::FASTGAN_ISA
