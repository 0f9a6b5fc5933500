// The two ways a 4x4 stride-2 padding-1 convolution becomes products of matrices in panel layout. Both have a large side
// [N, LH, LW, C] and a small side [N, H, W, K], joined by a weight [K, C, 4, 4]: a convolution maps large to small, a
// transposed convolution or an input gradient small to large, and a weight gradient both to the weight.
//
// A scheme turns a tile of either side into `points` rows of a product's operand and back (the transposed map), and the
// weight into the other operand. Depth on the large side is groups * phases panels, on the small side `small_panels`.
//   operands     large V [points][groups][phases][stride][panel],  small Y [points][small_panels][stride][panel], where
//                stride is the number of tiles made odd: panels a power of two apart would share one set of the cache
//   weights      of one panel of the result: [points][depth of the operand + 1][panel], for the same reason
#pragma once
#include "cpu/block.h"
#include "cpu/gemm.h"
#include "cpu/winograd.h"

namespace fastgan::cpu::FASTGAN_ISA {

struct Sizes {
  int64_t N, C, LH, LW, K, H, W;
};

constexpr int taps = 16;

#if defined(__AVX2__) && !defined(__AVX512F__)
// Eight rows of eight, transposed in registers: rows[i][j] becomes rows[j][i].
FASTGAN_INLINE void transpose(Vec<float> (&rows)[8]) {
  Vec<float> pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]), pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; j++) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
#define FASTGAN_HAS_TRANSPOSE
#endif

// The taps of `n` filters, `stride` elements apart, one filter per lane; and back.
template <class T>
FASTGAN_INLINE void load_taps(const T* w, int64_t stride, int64_t n, Vec<T> (&tap)[taps]) {
#ifdef FASTGAN_HAS_TRANSPOSE
  if constexpr (sizeof(T) == 4) {
    if (n == lanes<T>) {
      Vec<T> rows[8];
      for (int half = 0; half < taps; half += 8) {
        for (int i = 0; i < 8; i++) rows[i] = load(w + i * stride + half);
        transpose(rows);
        for (int i = 0; i < 8; i++) tap[half + i] = rows[i];
      }
      return;
    }
  }
#endif
  T lane[taps][lanes<T>] = {};
  for (int64_t i = 0; i < n; i++) {
    for (int t = 0; t < taps; t++) lane[t][i] = w[i * stride + t];
  }
  for (int t = 0; t < taps; t++) tap[t] = load(lane[t]);
}

template <class T>
FASTGAN_INLINE void store_taps(T* w, int64_t stride, int64_t n, const Vec<T> (&tap)[taps]) {
#ifdef FASTGAN_HAS_TRANSPOSE
  if constexpr (sizeof(T) == 4) {
    if (n == lanes<T>) {
      Vec<T> rows[8];
      for (int half = 0; half < taps; half += 8) {
        for (int i = 0; i < 8; i++) rows[i] = tap[half + i];
        transpose(rows);
        for (int i = 0; i < 8; i++) store(w + i * stride + half, rows[i]);
      }
      return;
    }
  }
#endif
  T lane[taps][lanes<T>];
  for (int t = 0; t < taps; t++) store(lane[t], tap[t]);
  for (int64_t i = 0; i < n; i++) {
    for (int t = 0; t < taps; t++) w[i * stride + t] = lane[t][i];
  }
}

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
        tiles_y((s.H + tile_height - 1) / tile_height),
        tiles_x((s.W + tile_width - 1) / tile_width),
        large{2 * tile_height * tiles_y + 2, 2 * tile_width * tiles_x + 2, groups * panel<T>, 1},
        small{tile_height * tiles_y, tile_width * tiles_x, small_panels * panel<T>, 0} {}

  int64_t tiles() const { return tiles_y * tiles_x; }

  // Calls f(image, vec, operand): pointers to one lane group of one tile in the padded image and in the operand.
  template <class Image, class Operand, class F>
  FASTGAN_INLINE void for_tiles(const Frame& frame, int64_t step_y, int64_t step_x, Image* image, Operand* operand,
                                int64_t step, int64_t groups, F f) const {
    for (int64_t i = 0; i < tiles_y; i++) {
      for (int64_t j = 0; j < tiles_x; j++, operand += panel<T>) {
        Image* tile = image + (i * step_y * frame.columns + j * step_x) * frame.channels;
        for (int64_t g = 0; g < groups; g++) {
          for (int half = 0; half < panel<T>; half += lanes<T>) {
            f(tile + g * panel<T> + half, operand + g * step + half);
          }
        }
      }
    }
  }

  // `operand` stands at the image's first tile.
  void large_to_operand(const T* image, T* operand, int64_t stride) const {
    int64_t line = large.columns * large.channels, step = large.channels, point = phases * groups * stride * panel<T>;
    for_tiles(large, 2 * tile_height, 2 * tile_width, image, operand, phases * stride * panel<T>, groups, [&](const T* in, T* out) {
      for (int phase = 0; phase < phases; phase++) {
        const T* d = in + phase / 2 * line + phase % 2 * step;
        Vec<T> value[3][5], transformed[3][5];
        for (int i = 0; i < 3; i++) {
          for (int j = 0; j < 5; j++) value[i][j] = load(d + 2 * i * line + 2 * j * step);
        }
        large_to_points<T>(value, transformed);
        T* v = out + phase * stride * panel<T>;
        FASTGAN_UNROLL for (int p = 0; p < points; p++) store(v + p * point, transformed[p / 5][p % 5]);
      }
    });
  }

  void operand_to_large(const T* operand, T* image, int64_t stride) const {
    int64_t line = large.columns * large.channels, step = large.channels, point = phases * groups * stride * panel<T>;
    for_tiles(large, 2 * tile_height, 2 * tile_width, image, operand, phases * stride * panel<T>, groups, [&](T* out, const T* in) {
      for (int phase = 0; phase < phases; phase++) {
        const T* m = in + phase * stride * panel<T>;
        Vec<T> value[3][5], transformed[3][5];
        FASTGAN_UNROLL for (int p = 0; p < points; p++) value[p / 5][p % 5] = load(m + p * point);
        points_to_large<T>(value, transformed);
        T* x = out + phase / 2 * line + phase % 2 * step;
        for (int i = 0; i < 3; i++) {
          for (int j = 0; j < 5; j++) {
            T* at = x + 2 * i * line + 2 * j * step;
            store(at, load(at) + transformed[i][j]);
          }
        }
      }
    });
  }

  void small_to_operand(const T* image, T* operand, int64_t stride) const {
    int64_t line = small.columns * small.channels, step = small.channels, point = small_panels * stride * panel<T>;
    for_tiles(small, tile_height, tile_width, image, operand, stride * panel<T>, small_panels, [&](const T* in, T* out) {
      Vec<T> value[2][4], transformed[3][5];
      for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) value[i][j] = load(in + i * line + j * step);
      }
      small_to_points<T>(value, transformed);
      FASTGAN_UNROLL for (int p = 0; p < points; p++) store(out + p * point, transformed[p / 5][p % 5]);
    });
  }

  void operand_to_small(const T* operand, T* image, int64_t stride) const {
    int64_t line = small.columns * small.channels, step = small.channels, point = small_panels * stride * panel<T>;
    for_tiles(small, tile_height, tile_width, image, operand, stride * panel<T>, small_panels, [&](T* out, const T* in) {
      Vec<T> value[3][5], transformed[2][4];
      FASTGAN_UNROLL for (int p = 0; p < points; p++) value[p / 5][p % 5] = load(in + p * point);
      points_to_small<T>(value, transformed);
      for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) store(out + i * line + j * step, transformed[i][j]);
      }
    });
  }

  // The transformed weight for panel `kp` of the small side.
  void weight_to_small(const T* weight, int64_t kp, T* out) const {
    int64_t point = (phases * groups * panel<T> + 1) * panel<T>;
    for (int64_t c = 0; c < groups * panel<T>; c++) {
      for (int half = 0; half < panel<T>; half += lanes<T>) {
        int64_t k = kp * panel<T> + half;
        Vec<T> tap[taps];
        load_taps(weight + (k * C + c) * taps, C * taps, std::clamp<int64_t>(c < C ? K - k : 0, 0, lanes<T>), tap);
        FASTGAN_UNROLL for (int phase = 0; phase < phases; phase++) {
          transform_taps(tap, phase, out + ((c / panel<T> * phases + phase) * panel<T> + c % panel<T>) * panel<T> + half, point);
        }
      }
    }
  }

  // The same for panel `o` = (panel of C, phase) of the large side.
  void weight_to_large(const T* weight, int64_t o, T* out) const {
    int64_t depth = small_panels * panel<T>, cp = o / phases, phase = o % phases, point = (depth + 1) * panel<T>;
    for (int64_t k = 0; k < depth; k++) {
      for (int half = 0; half < panel<T>; half += lanes<T>) {
        int64_t c = cp * panel<T> + half;
        Vec<T> tap[taps];
        load_taps(weight + (k * C + c) * taps, taps, std::clamp<int64_t>(k < K ? C - c : 0, 0, lanes<T>), tap);
        T* to = out + k * panel<T> + half;
        switch (phase) {  // a constant phase keeps the taps in registers
          case 0: transform_taps(tap, 0, to, point); break;
          case 1: transform_taps(tap, 1, to, point); break;
          case 2: transform_taps(tap, 2, to, point); break;
          default: transform_taps(tap, 3, to, point);
        }
      }
    }
  }

  FASTGAN_INLINE static void transform_taps(const Vec<T> (&tap)[taps], int phase, T* to, int64_t point) {
    Vec<T> w[2][2], u[3][5];
    for (int i = 0; i < 2; i++) {
      for (int j = 0; j < 2; j++) w[i][j] = tap[(2 * i + phase / 2) * 4 + 2 * j + phase % 2];
    }
    weight_to_points<T>(w, u);
    FASTGAN_UNROLL for (int p = 0; p < points; p++) store(to + p * point, u[p / 5][p % 5]);
  }

  // blocks [points][phases][panel of C][panel of K], for one group of C and one panel of K, to the weight's gradient.
  void blocks_to_weight(const T* blocks, int64_t group, int64_t kp, T* weight) const {
    for (int64_t c = group * panel<T>, row = 0; row < panel<T> && c < C; row++, c++) {
      for (int half = 0; half < panel<T>; half += lanes<T>) {
        int64_t k = kp * panel<T> + half;
        if (k >= K) break;
        Vec<T> tap[taps];
        for (int phase = 0; phase < phases; phase++) {
          Vec<T> u[3][5], w[2][2];
          for (int p = 0; p < points; p++) {
            u[p / 5][p % 5] = load(blocks + ((p * phases + phase) * panel<T> + row) * panel<T> + half);
          }
          points_to_weight<T>(u, w);
          for (int i = 0; i < 2; i++) {
            for (int j = 0; j < 2; j++) tap[(2 * i + phase / 2) * 4 + 2 * j + phase % 2] = w[i][j];
          }
        }
        store_taps(weight + (k * C + c) * taps, C * taps, std::min<int64_t>(lanes<T>, K - k), tap);
      }
    }
  }
};

// The definition as a matrix product (im2col): for few channels, where Winograd's transforms cost more than they save.
// Depth on the large side is (ky, kx, c); a tile is one pixel.
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

  void operand_to_large(const T* operand, T* image, int64_t stride) const {
    int64_t line = large.columns * C;
    std::vector<T> patch(groups * panel<T>);
    for (int64_t pixel = 0; pixel < H * W; pixel++, operand += panel<T>) {
      T* corner = image + 2 * (pixel / W) * line + 2 * (pixel % W) * C;
      for (int64_t g = 0; g < groups; g++) std::copy_n(operand + g * stride * panel<T>, panel<T>, patch.data() + g * panel<T>);
      for (int y = 0; y < 4; y++) {
        T* to = corner + y * line;
        const T* from = patch.data() + y * 4 * C;
        for (int64_t i = 0; i < 4 * C; i++) to[i] += from[i];
      }
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

  void weight_to_small(const T* weight, int64_t kp, T* out) const {
    std::fill(out + taps * C * panel<T>, out + groups * panel<T> * panel<T>, T(0));
    for (int64_t c = 0; c < C; c++) {
      for (int half = 0; half < panel<T>; half += lanes<T>) {
        int64_t k = kp * panel<T> + half;
        Vec<T> tap[taps];
        load_taps(weight + (k * C + c) * taps, C * taps, std::clamp<int64_t>(K - k, 0, lanes<T>), tap);
        for (int t = 0; t < taps; t++) store(out + (t * C + c) * panel<T> + half, tap[t]);
      }
    }
  }

  void weight_to_large(const T* weight, int64_t group, T* out) const {
    int64_t first = group * panel<T>, count = std::min<int64_t>(panel<T>, taps * C - first);
    std::fill_n(out, small_panels * panel<T> * panel<T>, T(0));
    for (int64_t d = 0; d < count; d++) {
      const T* filter = weight + (first + d) % C * taps + (first + d) / C;
      for (int64_t k = 0; k < K; k++) out[k * panel<T> + d] = filter[k * C * taps];
    }
  }

  void blocks_to_weight(const T* blocks, int64_t group, int64_t kp, T* weight) const {
    for (int64_t row = 0; row < panel<T>; row++) {
      int64_t tap = (group * panel<T> + row) / C, c = (group * panel<T> + row) % C;
      for (int64_t k = kp * panel<T>, i = 0; tap < taps && k < K && i < panel<T>; k++, i++) {
        weight[(k * C + c) * taps + tap] = blocks[row * panel<T> + i];
      }
    }
  }
};

}  // namespace fastgan::cpu::FASTGAN_ISA
