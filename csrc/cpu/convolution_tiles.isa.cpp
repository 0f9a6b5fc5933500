// The convolutions by their definition on AMX, which multiplies bf16: 16 times as many products a second as AVX-512's in fp32,
// so that in bf16 what is left of the time is making operands and finishing results. Numbers of fp32 are three of bf16, and six
// products of those, which leave less error than fp32's own and are faster than Winograd's algorithm in fp32. Each thread takes
// some images through all of that in its second-level cache, so that no more threads work than there are groups of images; only
// a weight's gradient, which is a sum over all images, is made by all threads together.
#if defined(__AMX_BF16__)
#include <utility>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/parallel.h"
#include "cpu/tile_images.h"
#include "cpu/tile_weights.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t at_once = 16;               // products that are added up in tiles before their sums go to memory
constexpr int64_t run_tiles = 64;             // those of a weight's gradient that are summed apart: a long sum loses small ones
constexpr int64_t cached_images = 3 << 19;    // bytes of operands and results that a thread has at a time
constexpr int64_t cached_weights = 4 << 20;   // of weights that every turn of a thread may bring from the last level
constexpr int64_t cached_gradient = 5 << 18;  // of the operands of a block of a weight's gradient

// Channels of a result, an odd number of cache lines: a power of two apart, pixels would share few places in a cache.
int64_t odd_lines(int64_t channels) { return (tiles_of(channels) | 1) * tile_columns; }

// Where the pixels of a result's rows come from and go to: rows of tiles, each of a row's pixels of one parity.
struct Phase {
  int64_t rows, from, from_row, to, to_row;  // offsets of the first row and from row to row
  std::vector<int64_t> taps;                 // offsets in the operand
};

// Of images in groups of those that are side by side.
template <class S>
struct Product {
  TileWeights<S> weights;  // of each phase, one after the other
  std::vector<Phase> phases;
  int64_t tiles, block, result_pixel, result;  // tiles of a row; sizes of a block of a group's operand, its result and a pixel of that

  int64_t operand(int64_t steps) const { return parts<S> * steps * block; }

  // To the results of `count` groups in `to` what steps first .. first + chunk of depth add, their operands in `from`. Some of the
  // weights at a time serve all rows; meanwhile memory brings the next.
  void multiply(const bfloat16* from, int64_t count, const bfloat16* u, int64_t first, int64_t chunk, float* to) const {
    Tiles configured;
    std::vector<std::pair<const bfloat16*, float*>> places;  // of each tile
    std::vector<int64_t> offsets;  // of each step and tap
    for (const Phase& phase : phases) {
      places.clear(), offsets.clear();
      for (int64_t i = 0; i < count; i++) {
        for (int64_t y = 0; y < phase.rows; y++) {
          const bfloat16* a = from + i * operand(chunk) + phase.from + y * phase.from_row;
          float* c = to + i * result + phase.to + y * phase.to_row;
          for (int64_t t = 0; t < tiles; t++) places.emplace_back(a + t * tile_rows * tile_depth, c + t * tile_rows * result_pixel);
        }
      }
      if (places.size() % 2) places.push_back(places.back());
      for (int64_t step = 0; step < chunk; step++) {
        for (int64_t tap : phase.taps) offsets.push_back(step * block + tap);
      }
      int64_t all = count * phase.rows * tiles, depth = offsets.size();
      for (int64_t column = 0; column < weights.tiles; column += 2) {
        const bfloat16* b_first = u + weights.block(first, column);
        int64_t pairs = (all + 1) / 2, one = parts<S> * weights.part(column), lines = (one / 32 + pairs - 1) / pairs;
        for (int64_t at = 0; at < depth; at += at_once, b_first += at_once * one) {
          int64_t end = std::min(at + at_once, depth);
          const bfloat16* next_column = column + 2 < weights.tiles ? u + weights.block(first, column + 2) : u + weights.size();
          const bfloat16* next = end < depth ? b_first + (end - at) * one : next_column;
          for (int64_t tile = 0; tile < all; tile += 2) {
            const bfloat16* a[2] = {places[tile].first, places[tile + 1].first};
            float* c[2] = {places[tile].second + column * tile_columns, places[tile + 1].second + column * tile_columns};
            with_tiles(tile + 1 < all, weights.width(column) == 2, [&](auto R, auto V) __attribute__((always_inline)) {
              using Block = Sums<R(), V()>;
              first + at > 0 ? Block::load(c, result_pixel) : Block::zero();
              const bfloat16* b = b_first;
              for (int64_t i = at; i < end; i++, b += one) {
                for (int64_t line = 0; line < lines; line++, next += 32) __builtin_prefetch(next, 0, 2);
                Block::template add<parts<S>>(a[0] + offsets[i], a[1] + offsets[i], chunk * block, b, b + tile_weights,
                                              V() * tile_weights);
              }
              Block::store(c, result_pixel);
            });
          }
        }
      }
      u += weights.size();
    }
  }
};

// Results of N images, `images` of them in a group, from
//   weights(u)
//   read(first image, first step, steps, operand)
//   finish(image, its first pixel in the result)
template <class S, class Weights, class Read, class FinishImage>
void run_product(const Product<S>& p, int64_t N, int64_t images, const Weights& weights, const Read& read,
                 const FinishImage& finish) {
  int64_t groups = (N + images - 1) / images, threads = thread_count(), steps = p.weights.steps;
  int64_t u_size = p.weights.size() * static_cast<int64_t>(p.phases.size());
  bfloat16* u = scratch<bfloat16>(Scratch::weights, u_size);
  weights(u);
  // Larger weights serve as many images as can be at a time: those take some of their channels after the other.
  bool whole = u_size * int64_t{sizeof(bfloat16)} <= cached_weights;
  auto bytes = [&](int64_t chunk) { return p.operand(chunk) * int64_t{sizeof(bfloat16)} + p.result * int64_t{sizeof(float)}; };
  int64_t share = (groups + threads - 1) / threads, fit = std::max<int64_t>(1, cached_images / bytes(whole ? steps : 1));
  int64_t turns = (share + fit - 1) / fit, step = (share + turns - 1) / turns;  // equal shares for all, in as few turns as fit
  int64_t chunk = whole ? steps : 1;
  while (chunk < steps && step * bytes(chunk + 1) <= cached_images) chunk++;
  parallel((groups + step - 1) / step, [&](int64_t task) {
    int64_t first = task * step, count = std::min(step, groups - first);
    // The last tile of a row reaches up to 15 lines beyond its copy, and of an odd large side as many more as there are images.
    bfloat16* operand = scratch<bfloat16>(Scratch::small, count * p.operand(chunk) + 2 * tile_rows * tile_depth);
    float* result = scratch<float>(Scratch::sums, count * p.result);
    for (int64_t from = 0; from < steps; from += chunk) {
      int64_t some = std::min(chunk, steps - from);
      for (int64_t i = 0; i < count; i++) read((first + i) * images, from, some, operand + i * p.operand(some));
      p.multiply(operand, count, u, from, some, result);
    }
    for (int64_t i = 0; i < count; i++) {
      for (int64_t image = 0; image < std::min(images, N - (first + i) * images); image++) {
        finish((first + i) * images + image, result + i * p.result + image * p.result_pixel);
      }
    }
  });
}

template <class S>
void to_small(const Convolution& c) {
  Sizes s = sizes_of(c);
  Source<float, S> source = source_of<float, S>(c.large);
  Filters<const float> filters{static_cast<const float*>(c.weight), c.K, c.C, c.weight_channels_last};
  Output<float, S> output(c.result, s.N, s.H, s.W, s.K);
  int64_t images = images_together(s.N, s.W), tiles = tiles_of(s.W * images);
  Copy<bfloat16, S> copy{s.N, s.LH, s.LW, s.C, images, 2 * s.H + 2, 2, s.W + 1};
  Unrolled<bfloat16> patches{s, images};
  bool unrolled = patches.serves<S>();
  int64_t result_pixel = odd_lines(s.K), result_row = tiles * tile_rows * result_pixel;
  Phase phase{s.H, 0, unrolled ? patches.row() : 2 * copy.row(), 0, result_row, {}};
  for (int64_t tap = 0; tap < (unrolled ? 1 : taps); tap++) phase.taps.push_back(unrolled ? 0 : copy.offset(tap / 4, tap % 4));
  Product<S> product{TileWeights<S>(phase.taps.size(), steps_of(unrolled ? patches.depth() : s.C), tiles_of(s.K)),
                     {phase}, tiles, unrolled ? patches.block() : copy.block(), result_pixel, s.H * result_row};
  run_product(product, s.N, images,
              [&](bfloat16* u) {
                if constexpr (parts<S> == 1) {
                  if (unrolled) return weights_to_small_unrolled(filters, product.weights, u);
                }
                weights_to_small(filters, product.weights, u);
              },
              [&](int64_t first, int64_t from, int64_t steps, bfloat16* to) {
                if constexpr (parts<S> == 1) {
                  if (unrolled) return patches.read(source, first, to);
                }
                copy.read(source, first, from, steps, to);
              },
              [&](int64_t image, const float* from) {
                write_image(output.sink, image, s.H, s.W, s.K, from, dense_steps(result_row, images * result_pixel));
              });
  output.combine(s.N, s.H, s.W, s.K);
}

// Pixels of each parity are a 2x2 stride-1 convolution of the small side: polyphase.h. Results keep parities of columns apart.
template <class S>
void to_large(const Convolution& c) {
  Sizes s = sizes_of(c);
  Source<float, S> source = source_of<float, S>(c.small);
  Filters<const float> filters{static_cast<const float*>(c.weight), c.K, c.C, c.weight_channels_last};
  Output<float, S> output(c.result, s.N, s.LH, s.LW, s.C);
  int64_t images = images_together(s.N, s.W), tiles = tiles_of((s.LW + 1) / 2 * images);
  Copy<bfloat16, S> copy{s.N, s.H, s.W, s.K, images, s.H + 2, 1, s.W + 2};
  int64_t result_pixel = odd_lines(s.C), odd = tiles * tile_rows * result_pixel;
  Product<S> product{TileWeights<S>(4, steps_of(s.K), tiles_of(s.C)), {}, tiles, copy.block(), result_pixel, s.LH * 2 * odd};
  for (int64_t y = 0; y < 2; y++) {
    for (int64_t x = 0; x < 2; x++) {
      Phase phase{(s.LH - y + 1) / 2, copy.offset(y, x), copy.row(), (2 * y + x) * odd, 4 * odd, {}};
      for (int64_t tap = 0; tap < 4; tap++) phase.taps.push_back(copy.offset(tap / 2, tap % 2));
      product.phases.push_back(phase);
    }
  }
  Steps steps{2 * odd, images * result_pixel, odd};
  run_product(product, s.N, images,
              [&](bfloat16* u) { weights_to_large(filters, product.weights, u); },
              [&](int64_t first, int64_t from, int64_t steps, bfloat16* to) { copy.read(source, first, from, steps, to); },
              [&](int64_t image, const float* from) { write_image(output.sink, image, s.LH, s.LW, s.C, from, steps); });
  output.combine(s.N, s.LH, s.LW, s.C);
}

// Sums [taps][filters of two tiles][channels of two tiles] to the weight's gradient. Unrolled: one tap, channels are (tap, channel).
void write_sums(const float* sums, int64_t k, int64_t c, int64_t channels, bool unrolled, const Filters<float>& w) {
  constexpr int64_t row = 2 * tile_columns, tap_size = 2 * tile_rows * row;
  for (int64_t i = 0; i < std::min(2 * tile_rows, w.K - k); i++, sums += row) {
    if (unrolled) {
      for (int64_t j = 0; j < std::min(row, channels - c); j++) *w.at(k + i, (c + j) % w.C, (c + j) / w.C) = sums[j];
      continue;
    }
    for (int64_t half = 0; half < row && c + half < w.C; half += tile_columns) {
      int64_t n = std::min<int64_t>(tile_columns, w.C - c - half);
      Vec<float> rows[taps];
      for (int tap = 0; tap < taps; tap++) rows[tap] = load(sums + tap * tap_size + half);
      if (w.channels_last) {
        for (int tap = 0; tap < taps; tap++) store(w.at(k + i, c + half, tap), rows[tap], n);
      } else {
        transpose(rows);
        for (int64_t j = 0; j < n; j++) store(w.at(k + i, c + half + j, 0), rows[j]);
      }
    }
  }
}

// A: the small side, transposed; B: the large one; both in pairs of images.
template <class S>
void to_weight(const Convolution& c) {
  Sizes s = sizes_of(c);
  Source<float, S> large = source_of<float, S>(c.large), small = source_of<float, S>(c.small);
  Filters<float> gradient{static_cast<float*>(c.result.out), c.K, c.C, c.weight_channels_last};
  int64_t units = images_together((s.N + 1) / 2, s.W), groups = (s.N + 2 * units - 1) / (2 * units);
  Copy<Pair, S> copy{s.N, s.LH, s.LW, s.C, units, 2 * s.H + 2, 2, s.W + 1};
  Unrolled<Pair> patches{s, units};
  Transposed<S> rows{s.N, s.H, s.W, s.K, units};
  bool unrolled = patches.serves<S>();
  int64_t block = unrolled ? patches.block() : copy.block(), blocks = unrolled ? patches.blocks() : copy.blocks();
  int64_t large_part = blocks * block, large_size = parts<S> * large_part;
  int64_t a_group = rows.tiles() * rows.tile_size;
  int64_t pairs = parts<S> * (std::min<int64_t>(2, blocks) * block + std::min<int64_t>(2, rows.blocks()) * a_group);
  int64_t step = std::clamp<int64_t>(cached_gradient / (pairs * int64_t{sizeof(Pair)}), 1, groups);
  // What the last tile of a row reads beyond it meets zeros: the next row or the next channels, which may spread NaN, or behind
  // the copies zeros.
  int64_t slack = tile_rows * line<Pair>;
  Pair* b = scratch<Pair>(Scratch::large, step * large_size + slack);
  int64_t a_block = step * a_group, a_part = rows.blocks() * a_block;
  Pair* a = scratch<Pair>(Scratch::small, parts<S> * a_part);
  int64_t depth = unrolled ? patches.depth() : s.C, tap_count = unrolled ? 1 : taps;
  int64_t k_blocks = (tiles_of(s.K) + 1) / 2, c_blocks = (tiles_of(depth) + 1) / 2;
  constexpr int64_t sum_size = 4 * tile_rows * tile_columns;
  bool once = step == groups;  // then a task's sums stay in its cache
  float* sums = once ? nullptr : scratch<float>(Scratch::sums, k_blocks * c_blocks * tap_count * sum_size);
  for (int64_t first = 0; first < groups; first += step) {
    int64_t count = std::min(step, groups - first);
    parallel(2 * count, [&](int64_t task) {
      int64_t i = task / 2, image = (first + i) * 2 * units;
      if (task % 2) return rows.read(small, image, a + i * a_group, a_block);
      Pair* to = b + i * large_size;
      if constexpr (parts<S> == 1) {
        if (unrolled) return patches.read(large, image, to);
      }
      copy.read(large, image, 0, blocks, to);
    });
    std::fill_n(b + count * large_size, slack, Pair{});
    parallel(k_blocks * c_blocks, [&](int64_t task) {
      int64_t k = task % k_blocks * 2, column = task / k_blocks * 2;  // tiles: those that read the same images follow one another
      float* sum = once ? scratch<float>(Scratch::image, tap_count * sum_size) : sums + task * tap_count * sum_size;
      Tiles configured;
      with_tiles(k + 1 < tiles_of(s.K), column + 1 < tiles_of(depth), [&](auto R, auto V) __attribute__((always_inline)) {
        using Block = Sums<R(), V()>;
        for (int64_t tap = 0; tap < tap_count; tap++) {
          float* to[2] = {sum + tap * sum_size, sum + tap * sum_size + sum_size / 2};
          float run[sum_size];
          float* run_to[2] = {run, run + sum_size / 2};
          int64_t added = 0;
          bool fresh = first == 0;
          auto end_run = [&]() __attribute__((always_inline)) {
            Block::store(run_to, 2 * tile_columns);
            asm volatile("" ::: "memory");
            for (int64_t j = 0; j < sum_size; j++) to[0][j] = fresh ? run[j] : to[0][j] + run[j];
            fresh = false, added = 0;
            Block::zero();
          };
          Block::zero();
          const Pair* from = a + k * a_block;
          for (int64_t i = 0; i < count; i++) {
            for (int64_t y = 0; y < s.H; y++) {
              const Pair* at = b + i * large_size + column * block + (unrolled ? y * patches.row() : copy.offset(2 * y + tap / 4, tap % 4));
              for (int64_t tile = 0; tile < rows.row_tiles(); tile++, at += tile_rows * line<Pair>, from += rows.tile_size) {
                Block::template add<parts<S>>(from->of, (from + a_block)->of, 2 * a_part, at->of, (at + block)->of,
                                              2 * large_part);
                if (++added == run_tiles) end_run();
              }
            }
          }
          end_run();
        }
      });
      if (first + count == groups) write_sums(sum, k * tile_rows, column * tile_columns, depth, unrolled, gradient);
    });
  }
}

template <class S>
void run(const Convolution& c) {
  switch (c.direction) {
    case Direction::to_small: return to_small<S>(c);
    case Direction::to_large: return to_large<S>(c);
    case Direction::to_weight: return to_weight<S>(c);
  }
}

}  // namespace

void run_convolution(const Convolution& c) { run<float>(c); }
void run_convolution_bf16(const Convolution& c) { run<bfloat16>(c); }

}  // namespace fastgan::cpu::FASTGAN_ISA
#endif
