// The drivers over a scheme: read and transform the images, multiply, transform back and finish.
#if defined(__AVX2__) && !defined(__AMX_BF16__)  // without AVX2 convolutions are the library's; AMX has convolution_tiles.isa.cpp
#include "cpu/bfloat16.h"
#include "cpu/convolution.h"
#include "cpu/parallel.h"
#include "cpu/polyphase.h"
#include "cpu/schemes.h"
#include "cpu/scratch.h"
#include "cpu/thin.h"
#if defined(__AVX512F__)
#include "cpu/thin_shares.h"
#else
#include "cpu/thin_squares.h"
#endif
#include "cpu/views.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

// Images whose operands (`per_image` elements each) together stay within the last-level cache, or about within `budget` bytes: as
// many each time, and an even number or a multiple of four, for threads to share. It does not depend on the number of threads,
// for a weight's gradient is summed turn by turn.
constexpr int64_t cached = 12 << 20;
int64_t images_at_once(int64_t N, int64_t per_image, int64_t element_size, int64_t budget = cached) {
  int64_t most = std::clamp<int64_t>(budget / std::max<int64_t>(1, per_image * element_size), 1, std::max<int64_t>(1, N));
  int64_t turns = (N + most - 1) / most, each = (N + turns - 1) / turns, multiple = each > 2 ? 4 : 2;
  return std::min((each + multiple - 1) / multiple * multiple, N);
}

// A thread takes images of about `apart_tiles` tiles through all three stages on its own, in its second-level cache, where
// there are images enough for all and the whole transformed weight stays in the last level, and is used enough: by a tile of
// each thread for each `weights_per_tile` bytes.
constexpr int64_t apart_tiles = 32, apart_weights = vector_bytes == 64 ? 16 << 20 : 4 << 20, weights_per_tile = 128 << 10;

// product [points][out_panels][stride][panel] = operand [points][in_panels][stride][panel] * weight, `rows` of each, points
// `point_stride` apart. The transformed weight never exists as a whole, for deep layers it would be 52 MB: weight_of(first, last,
// from, count, u, point) makes the share of `together` output panels and of a chunk of depth in the cache of the thread that
// multiplies by it.
template <class T, class F>
void multiply_points(int points, const T* operand, int64_t in_panels, int64_t out_panels, int64_t rows, int64_t stride, int64_t run,
                     int64_t together, int64_t chunk, T* product, const F& weight_of) {
  constexpr int64_t rows_at_once = 48;  // which one read of a run of weights serves
  int64_t depth = in_panels * panel<T>, threads = thread_count();
  int64_t groups = std::max((out_panels + together - 1) / together, std::min(out_panels, threads));
  int64_t width = (out_panels + groups - 1) / groups;
  groups = (out_panels + width - 1) / width;
  int64_t cuts = std::clamp<int64_t>((threads + groups - 1) / groups, 1, rows / 64 + 1), share = (rows + cuts - 1) / cuts;
  chunk = std::min(chunk, depth);
  parallel(groups * cuts, [&](int64_t task) {
    int64_t o = task / cuts * width, last = std::min(o + width, out_panels), first = task % cuts * share;
    int64_t count = std::min(share, rows - first), u_point = point_stride<T>(width, chunk);
    T* u = scratch<T>(Scratch::weight, points * u_point);
    for (int64_t from = 0; from < depth; from += chunk) {
      int64_t deep = std::min(chunk, depth - from);
      weight_of(o, last, from, deep, u, u_point);
      for (int point = 0; point < points; point++) {
        const T* a = operand + point * point_stride<T>(in_panels, stride) + (from / panel<T> * stride + first) * panel<T>;
        const T* next = a;
        if (point + 1 < points) {
          next += point_stride<T>(in_panels, stride);
        } else if (from + deep < depth) {
          next = operand + ((from + deep) / panel<T> * stride + first) * panel<T>;
        }
        T* c = product + point * point_stride<T>(out_panels, stride) + (o * stride + first) * panel<T>;
        for (int64_t row = 0; row < count; row += rows_at_once) {
          // A stream has no gaps: it would be of other tasks' rows where they share a panel.
          Stream ahead{reinterpret_cast<const char*>(next + row * deep), cuts > 1 ? 0 : int64_t{sizeof(T)}};
          multiply_panels<T, false>(a + row * panel<T>, stride * panel<T>, u + point * u_point, deep * panel<T>, deep, run,
                                    c + row * panel<T>, stride * panel<T>, last - o, std::min(rows_at_once, count - row), from > 0, ahead);
        }
      }
    }
  });
}

// One side of a convolution and its operand's depth.
struct Side {
  int64_t H, W, C, panels;
  Frame frame;
  int64_t size() const { return H * W * C; }
};

// From the large side to the small one or, `up`, back.
template <class T, class S, class Scheme, bool up>
void convolve(const Sizes& s, const OperandView& operand, const Filters<const T>& weight, const ResultView& result) {
  Scheme scheme(s);
  Side large{s.LH, s.LW, s.C, Scheme::phases * scheme.groups, scheme.large}, small{s.H, s.W, s.K, scheme.small_panels, scheme.small};
  const Side &from = up ? small : large, &to = up ? large : small;
  Source<T, S> source = source_of<T, S>(operand);
  Output<T, S> output(result, s.N, to.H, to.W, to.C);
  // Where a result has few terms the library's error leaves less room: it sums 4 K of them to the large side, not 16 C.
  int64_t run = (up ? s.K < 256 : s.C < 64) ? short_run_length : run_length;
  int64_t tiles = scheme.tiles(), depth = from.panels * panel<T>;
  // Weights are transformed for all phases of a panel of the large side or for 64 channels of the small one, and so much depth
  // that all points take 0.4 MB, of AVX-512's larger second-level caches 0.8.
  constexpr int64_t together = up ? Scheme::phases : 64 / panel<T>, chunk = up ? 64 : std::max(64, Scheme::phases * panel<T>);
  static_assert(chunk % run_length == 0 && chunk % (up ? 1 : Scheme::phases * panel<T>) == 0);  // whole runs, whole groups

  auto read = [&](int64_t i, T* v, int64_t stride) {
    T* image = scratch<T>(Scratch::image, from.frame.size());
    read_image(source, i, from.H, from.W, from.C, from.frame, image);
    if constexpr (up) {
      scheme.small_to_operand(image, v, stride);
    } else {
      scheme.large_to_operand(image, v, stride);
    }
  };
  auto weights = [&](auto... panels) {
    if constexpr (up) {
      scheme.weight_to_large(weight, panels...);
    } else {
      scheme.weight_to_small(weight, panels...);
    }
  };
  auto write = [&](int64_t i, const T* m, int64_t stride) {
    T* image = scratch<T>(Scratch::image, to.frame.size());
    if constexpr (up) {
      scheme.operand_to_large(m, image, stride);
    } else {
      scheme.operand_to_small(m, image, stride);
    }
    write_image(output.sink, i, to.H, to.W, to.C, to.frame, image);
  };

  int64_t threads = thread_count(), u_point = point_stride<T>(to.panels, depth), transformed = Scheme::points * u_point;
  bool apart = s.N >= 4 * threads &&
               transformed * static_cast<int64_t>(sizeof(T)) <= std::min(apart_weights, weights_per_tile * (s.N * tiles / threads));
  int64_t per_tile = Scheme::points * panel<T>;
  int64_t step = apart ? std::clamp<int64_t>(apart_tiles / tiles, 1, s.N / (2 * threads))
                       : images_at_once(s.N, tiles * per_tile * (from.panels + to.panels), sizeof(T));
  // Both ways add up the same terms in the same order.
  if (apart) {
    T* u = scratch<T>(Scratch::weights, transformed);
    constexpr int64_t share = up ? Scheme::phases : 1;
    parallel(to.panels / share, [&](int64_t task) {
      int64_t o = task * share;
      weights(o, o + share, 0, depth, u + o * depth * panel<T>, u_point);
    });
    parallel((s.N + step - 1) / step, [&](int64_t block) {
      int64_t first = block * step, count = std::min(step, s.N - first), rows = count * tiles, stride = rows | 1;
      int64_t v_point = point_stride<T>(from.panels, stride), m_point = point_stride<T>(to.panels, stride);
      T* v = scratch<T>(Scratch::large, Scheme::points * v_point);
      T* m = scratch<T>(Scratch::small, Scheme::points * m_point);
      for (int64_t i = 0; i < count; i++) read(first + i, v + i * tiles * panel<T>, stride);
      // What the next block reads, and what this one's result needs.
      int64_t next = first + count, more = std::min(step, s.N - next);
      Ahead ahead;
      ahead.add(source.a + next * from.size(), more * from.size());
      if (source.b) ahead.add(source.b + next * from.size(), more * from.size());
      if (output.sink.y) ahead.add(output.sink.y + first * to.size(), count * to.size());
      ahead.add(output.sink.out + first * to.size(), count * to.size());
      ahead.spread(Scheme::points * tile_runs(to.panels, rows, depth, run));
      for (int p = 0; p < Scheme::points; p++) {
        multiply_panels<T, vector_bytes == 64>(v + p * v_point, stride * panel<T>, u + p * u_point, depth * panel<T>,
                                               depth, run, m + p * m_point, stride * panel<T>, to.panels, rows, false,
                                               ahead);
      }
      for (int64_t i = 0; i < count; i++) write(first + i, m + i * tiles * panel<T>, stride);
    });
  } else {
    T* v = scratch<T>(Scratch::large, Scheme::points * point_stride<T>(from.panels, step * tiles | 1));
    T* m = scratch<T>(Scratch::small, Scheme::points * point_stride<T>(to.panels, step * tiles | 1));
    for (int64_t first = 0; first < s.N; first += step) {
      int64_t count = std::min(step, s.N - first), rows = count * tiles, stride = rows | 1;
      parallel(count, [&](int64_t i) { read(first + i, v + i * tiles * panel<T>, stride); });
      multiply_points(Scheme::points, v, from.panels, to.panels, rows, stride, run, together, chunk, m, weights);
      parallel(count, [&](int64_t i) { write(first + i, m + i * tiles * panel<T>, stride); });
    }
  }
  output.combine(s.N, to.H, to.W, to.C);
}

template <class T, class S, class Scheme>
void to_weight(const Sizes& s, const OperandView& large, const OperandView& small, const Filters<T>& weight) {
  Scheme scheme(s);
  Source<T, S> large_source = source_of<T, S>(large), small_source = source_of<T, S>(small);
  int64_t groups = scheme.groups, outer = Scheme::phases * groups, inner = scheme.small_panels, tiles = scheme.tiles();
  int64_t per_tile = Scheme::points * panel<T>;
  // Each turn brings all sums and writes all operands: as much of either, where last levels are slow.
  int64_t sums_size = outer * inner * per_tile * panel<T> * static_cast<int64_t>(sizeof(T));
  int64_t budget = std::clamp(sums_size, vector_bytes == 64 ? int64_t{3} << 20 : cached, cached);
  int64_t step = images_at_once(s.N, tiles * per_tile * (outer + inner), sizeof(T), budget);
  T* v = scratch<T>(Scratch::large, Scheme::points * point_stride<T>(outer, step * tiles | 1));
  T* y = scratch<T>(Scratch::small, Scheme::points * point_stride<T>(inner, step * tiles | 1));
  constexpr int64_t together = 4;  // panels of K whose blocks are summed side by side, so that they stay in cache
  constexpr int64_t block = panel<T> * panel<T>, blocks = Scheme::points * Scheme::phases * block;
  int64_t k_groups = (inner + together - 1) / together, tasks = groups * k_groups;
  // Up to some 64 channels are few tasks: then points are shared out, too, and sums (of `few` tasks, some 25 MB) go to the weight
  // when all are there.
  constexpr int64_t few = 16;
  int64_t threads = thread_count();
  bool cut_points = threads > 1 && tasks < std::min(2 * threads, few);
  int64_t cuts = cut_points ? std::min<int64_t>(Scheme::points, 4 * threads / tasks) : 1;
  bool once = step >= s.N && cuts == 1;
  T* sums = once ? nullptr : scratch<T>(Scratch::sums, tasks * together * blocks);
  for (int64_t first = 0; first < s.N; first += step) {
    int64_t count = std::min(step, s.N - first), rows = count * tiles, stride = rows | 1;
    parallel(count, [&](int64_t i) {
      T* image = scratch<T>(Scratch::image, std::max(scheme.large.size(), scheme.small.size()));
      read_image(large_source, first + i, s.LH, s.LW, s.C, scheme.large, image);
      scheme.large_to_operand(image, v + i * tiles * panel<T>, stride);
      read_image(small_source, first + i, s.H, s.W, s.K, scheme.small, image);
      scheme.small_to_operand(image, y + i * tiles * panel<T>, stride);
    });
    parallel(tasks * cuts, [&](int64_t i) {
      int64_t task = i / cuts, cut = i % cuts;
      int64_t group = task / k_groups, kp = task % k_groups * together, kps = std::min(together, inner - kp);
      T* sum = once ? scratch<T>(Scratch::image, together * blocks) : sums + task * together * blocks;
      auto outer_panel = [&](int64_t at) {  // of a point and phase
        return v + at / Scheme::phases * point_stride<T>(outer, stride) + (group * Scheme::phases + at % Scheme::phases) * stride * panel<T>;
      };
      auto inner_panel = [&](int64_t point, int64_t k) { return y + point * point_stride<T>(inner, stride) + (kp + k) * stride * panel<T>; };
      int64_t begin = Scheme::points * cut / cuts * Scheme::phases, end = Scheme::points * (cut + 1) / cuts * Scheme::phases;
      for (int64_t at = begin; at < end; at++) {
        int64_t point = at / Scheme::phases;
        // All of the large side's next panel, and of the small side's at the next point.
        const T* next = outer_panel(std::min(at + 1, end - 1));
        const T* next_inner = inner_panel(std::min(point + 1, (end - 1) / Scheme::phases), at % Scheme::phases * kps / Scheme::phases);
        for (int64_t k = 0; k < kps; k++) {
          int64_t part = k * rows * panel<T> / kps;
          PanelsAhead ahead{reinterpret_cast<const char*>(next + part), reinterpret_cast<const char*>(next_inner + part),
                            panel<T> * static_cast<int64_t>(sizeof(T)) / kps};
          multiply_transposed(outer_panel(at), inner_panel(point, k), rows, sum + k * blocks + at * block, first > 0, ahead);
        }
      }
      if (cuts == 1 && first + count == s.N) {
        for (int64_t k = 0; k < kps; k++) scheme.blocks_to_weight(sum + k * blocks, group, kp + k, weight);
      }
    });
  }
  if (cuts == 1) return;
  parallel(groups * inner, [&](int64_t i) {
    int64_t group = i / inner, kp = i % inner;
    scheme.blocks_to_weight(sums + (group * k_groups * together + kp) * blocks, group, kp, weight);
  });
}

template <class T, class S>
void run_in_place(const Convolution& c, const Sizes& s, const Filters<const T>& weight) {
  Thin<T> thin(s);
  if (c.direction == Direction::to_small) {
    Output<T, S> output(c.result, s.N, s.H, s.W, s.K);
    thin.to_small(source_of<T, S>(c.large), weight, output.sink);
    output.combine(s.N, s.H, s.W, s.K);
  } else if (c.direction == Direction::to_large) {
    Output<T, S> output(c.result, s.N, s.LH, s.LW, s.C);
    if (c.C <= thin_channels) {
      ThinToLarge<T>(s).to_large(source_of<T, S>(c.small), weight, output.sink);
    } else {
      Polyphase<T>(s).to_large(source_of<T, S>(c.small), weight, output.sink);
    }
    output.combine(s.N, s.LH, s.LW, s.C);
  } else {
    thin.to_weight(source_of<T, S>(c.large), source_of<T, S>(c.small),
                   {static_cast<T*>(c.result.out), c.K, c.C, c.weight_channels_last});
  }
}

// Winograd where it is both faster and within twice the library's error: short sums, padded tiles and panels forbid it.
bool use_winograd(const Convolution& c) {
  if (c.scheme != scheme_automatic) return c.scheme == scheme_winograd;
  int64_t tiles = ((c.H + tile - 1) / tile) * ((c.W + tile - 1) / tile);
  // Padded tiles must leave at most three quarters of the definition's products.
  if (4 * tiles * Winograd<float>::phases * winograd_points > 3 * c.H * c.W * taps) return false;
  if (c.direction == Direction::to_weight && c.N * c.H * c.W < 256) return false;
  return c.C >= 16 && c.K >= (c.direction == Direction::to_large ? 128 : 16);
}

// Products that read the images in place. To the small side rows must be long enough, and channels so few that the alternative is
// im2col (below 16) or Winograd with panels half empty; to the weight each image has sums of its own, which must be worth making
// and stay in the second-level cache (256 KB of them). Im2col has no pass to the large side.
bool use_in_place(const Convolution& c) {
  if (c.C <= thin_channels) return c.scheme != scheme_winograd;
  if (c.direction == Direction::to_large) return !use_winograd(c);
  if (c.scheme != scheme_automatic) return false;
  if (c.direction == Direction::to_small) return (c.C < 16 || 2 * c.C <= panel<float>) && c.W >= 4;
  return c.C <= 16 && c.H * c.W >= 64 && c.C * c.K <= 4096;
}

template <class T, class S = T>
void run(const Convolution& c) {
  Sizes s = sizes_of(c);
  Filters<const T> weight{static_cast<const T*>(c.weight), c.K, c.C, c.weight_channels_last};
  if (use_in_place(c)) return run_in_place<T, S>(c, s, weight);
  bool winograd = use_winograd(c);
  switch (c.direction) {
    case Direction::to_small:
      return winograd ? convolve<T, S, Winograd<T>, false>(s, c.large, weight, c.result) : convolve<T, S, Direct<T>, false>(s, c.large, weight, c.result);
    case Direction::to_large:
      return convolve<T, S, Winograd<T>, true>(s, c.small, weight, c.result);
    case Direction::to_weight: {
      Filters<T> gradient{static_cast<T*>(c.result.out), c.K, c.C, c.weight_channels_last};
      return winograd ? to_weight<T, S, Winograd<T>>(s, c.large, c.small, gradient) : to_weight<T, S, Direct<T>>(s, c.large, c.small, gradient);
    }
  }
}

}  // namespace

void run_convolution(const Convolution& c) { run<float>(c); }
void run_convolution_bf16(const Convolution& c) { run<float, bfloat16>(c); }
#if !defined(__AVX512F__)
void run_convolution_fp64(const Convolution& c) { run<double>(c); }
#endif

}  // namespace fastgan::cpu::FASTGAN_ISA
#endif
