// To the large side by the definition: its pixels of each parity (phase) are a 2x2 stride-1 convolution of the small side,
// with the taps of that parity. A row of such a window is 2 K consecutive values of the padded small image, so that the
// products read it in place and write the pixels where they belong: nothing is gathered before, nothing added up after.
#pragma once
#include "cpu/parallel.h"
#include "cpu/schemes.h"
#include "cpu/scratch.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <class T>
struct Polyphase {
  static constexpr int phases = 4, rows = 2;  // of a window
  static constexpr int64_t pixels_at_once = 64;  // of the small side, which one read of a tile's weight serves
  Sizes s;
  int64_t registers, tile, tiles, depth;  // of C: registers, those of a tile, tiles; the values of a window's row
  Frame small, large;

  explicit Polyphase(const Sizes& s)
      : s(s),
        registers((s.C + lanes<T> - 1) / lanes<T>),
        // Two or three leave no register empty where that can be; a tile of one alone loads more than it multiplies.
        tile(registers % 2 == 0 ? 2 : registers % 3 == 0 ? 3 : registers == 1 ? 1 : 2),
        tiles((registers + tile - 1) / tile),
        depth(2 * s.K),
        small{s.H + 2, s.W + 2, s.K, 1},
        large{s.LH, s.LW, tiles * tile * lanes<T>, 0} {}

  template <class S>
  void to_large(const Source<T, S>& source, const Filters<const T>& weight, const Sink<T, S>& sink) const {
    T* u = scratch<T>(Scratch::weights, taps * s.K * large.channels);
    parallel(s.K, [&](int64_t k) { weight_to_phases(weight, k, u); });
    int64_t step = std::clamp<int64_t>(pixels_at_once / (s.H * s.W), 1, s.N / (2 * thread_count()) + 1);
    parallel((s.N + step - 1) / step, [&](int64_t block) {
      int64_t first = block * step, count = std::min(step, s.N - first);
      T* operand = scratch<T>(Scratch::image, count * small.size());
      T* result = scratch<T>(Scratch::large, count * large.size());
      for (int64_t i = 0; i < count; i++) {
        read_image(source, first + i, s.H, s.W, s.K, small, operand + i * small.size());
      }
      switch (tile) {
        case 1: multiply<1>(operand, u, count, result); break;
        case 2: multiply<2>(operand, u, count, result); break;
        default: multiply<3>(operand, u, count, result);
      }
      for (int64_t i = 0; i < count; i++) {
        write_image(sink, first + i, s.LH, s.LW, s.C, large, result + i * large.size());
      }
    });
  }

  // Filter k to u [phases][tiles][rows of the window][its columns][K][tile].
  void weight_to_phases(const Filters<const T>& weight, int64_t k, T* u) const {
    for (int64_t c = 0; c < large.channels; c += lanes<T>) {
      Vec<T> tap[taps];
      load_taps(weight, k, c, tap);
      int64_t width = tile * lanes<T>;
      T* to = u + (c / width * rows * depth + k) * width + c % width;
      for (int t = 0; t < taps; t++) {  // a window's first row has the taps 3 and 2 of the phases 0 and 1, its second 1 and 0
        int y = 3 - t / 4, x = 3 - t % 4, phase = y % 2 * 2 + x % 2;
        store(to + ((phase * tiles * rows + y / 2) * depth + x / 2 * s.K) * width, tap[t]);
      }
    }
  }

  template <int V>
  void multiply(const T* operand, const T* u, int64_t count, T* result) const {
    constexpr int64_t width = V * lanes<T>;
    int64_t line = small.columns * s.K;
    for (int64_t phase = 0; phase < phases; phase++) {
      int64_t height = (s.LH - phase / 2 + 1) / 2, pixels = (s.LW - phase % 2 + 1) / 2;  // an odd side has one more of phase 0
      for (int64_t j = 0; j < tiles; j++) {
        for (int64_t r = 0; r < rows; r++, u += depth * width) {
          const T* from = operand + (phase / 2 + r) * line + phase % 2 * s.K;
          T* to = result + large.offset(phase / 2, phase % 2) + j * width;
          for (int64_t i = 0; i < count; i++) {
            for (int64_t y = 0; y < height; y++) {
              multiply_rows<T, V>(from + i * small.size() + y * line, RowStrides{s.K, run_length, run_length}, u, 0, depth, run_length,
                                  to + i * large.size() + large.offset(2 * y, 0), 2 * large.channels, 0, 1, pixels, r > 0);
            }
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
