// A weight [K, C, 4, 4] in fp32 as the right operand of AMX products, rounded to bf16 or in three parts: blocks of two tiles of
// columns (the last may have one), each block [depth / 32][taps][parts][tiles][16 pairs][16 columns][2]. It is made for every
// call: there is no copy to go stale.
#pragma once
#include "cpu/amx.h"
#include "cpu/parallel.h"
#include "cpu/taps.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <class S>
struct TileWeights {
  int64_t positions, steps, tiles;  // of the kernel; of tile_depth; of columns

  TileWeights(int64_t positions, int64_t steps, int64_t tiles) : positions(positions), steps(steps), tiles(tiles) {}
  int64_t size() const { return positions * steps * tiles * parts<S> * tile_weights; }
  int64_t width(int64_t tile) const { return std::min<int64_t>(2, tiles - (tile & ~1)); }  // of the block that holds it
  int64_t part(int64_t tile) const { return width(tile) * tile_weights; }
  int64_t step(int64_t tile) const { return positions * parts<S> * part(tile); }
  int64_t block(int64_t first, int64_t tile) const {
    return (tile & ~1) * steps * positions * parts<S> * tile_weights + first * step(tile);
  }
  // The row of a tile of columns that holds the pair of depths `pair`, of the first part.
  int64_t row(int64_t tap, int64_t pair, int64_t tile) const {
    int64_t first = block(pair / tile_rows, tile) + tap * parts<S> * part(tile) + (tile & 1) * tile_weights;
    return first + pair % tile_rows * 2 * tile_columns;
  }
};

// Rows of pairs, split into parts.
template <class S>
using Rows = Vec<float>[parts<S>][lanes<float>];

template <class S>
FASTGAN_INLINE void pair_row(Rows<S>& rows, int i, Vec<float> a, Vec<float> b) {
  Parts<S> first, second;
  split<S>(a, first), split<S>(b, second);
  FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) rows[p][i] = paired(first[p], second[p]);
}

template <class S>
FASTGAN_INLINE void transpose_parts(Rows<S>& rows) {
  FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) transpose(rows[p]);
}

template <class S>
FASTGAN_INLINE void store_row(bfloat16* to, int64_t part, const Rows<S>& rows, int i) {
  FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) std::memcpy(to + p * part, &rows[p][i], sizeof rows[p][i]);
}

// Filters are asked for so many values before they are read: sixteen of them, read side by side, are more streams than the
// processor foresees.
constexpr int64_t ahead = 256;

// The taps of one filter, contiguous; 0 beyond the weight.
FASTGAN_INLINE Vec<float> taps_at(const Filters<const float>& w, int64_t k, int64_t c) {
  __builtin_prefetch(w.at(k, c, 0) + ahead, 0, 2);
  return k < w.K && c < w.C ? load(w.at(k, c, 0)) : Vec<float>{};
}

// `count` channels of one tap of a channels-last filter, 0 beyond the weight.
FASTGAN_INLINE Vec<float> channels_at(const Filters<const float>& w, int64_t k, int64_t c, int64_t tap) {
  int64_t n = k < w.K ? std::clamp<int64_t>(w.C - c, 0, lanes<float>) : 0;
  __builtin_prefetch(w.at(k, c, tap) + ahead, 0, 2);
  return n ? load(w.at(k, c, tap), n) : Vec<float>{};
}

// Depth are the channels of each tap, columns the filters. Loops follow the memory of the weight, which for a deep layer is
// most of what a product reads.
template <class S>
void weights_to_small(const Filters<const float>& w, const TileWeights<S>& t, bfloat16* u) {
  parallel(t.tiles * 4, [&](int64_t task) {
    int64_t tile = task / 4, quarter = task % 4, k = tile * tile_columns;
    Rows<S> rows;
    if (w.channels_last) {
      for (int64_t tap = 4 * quarter; tap < 4 * quarter + 4; tap++) {
        for (int64_t c = 0; c < w.C; c += tile_depth) {
          for (int i = 0; i < tile_columns; i++) {
            Vec<float> low = channels_at(w, k + i, c, tap), high = channels_at(w, k + i, c + lanes<float>, tap);
            Parts<S> lows, highs;
            split<S>(low, lows), split<S>(high, highs);
            FASTGAN_UNROLL for (int p = 0; p < parts<S>; p++) rows[p][i] = Vec<float>(_mm512_cvtne2ps_pbh(highs[p], lows[p]));
          }
          transpose_parts<S>(rows);
          for (int i = 0; i < tile_rows; i++) store_row<S>(u + t.row(tap, c / 2 + i, tile), t.part(tile), rows, i);
        }
      }
    } else {
      int64_t pairs = t.steps * tile_rows;
      for (int64_t pair = quarter * pairs / 4; pair < (quarter + 1) * pairs / 4; pair++) {
        for (int i = 0; i < tile_columns; i++) pair_row<S>(rows, i, taps_at(w, k + i, 2 * pair), taps_at(w, k + i, 2 * pair + 1));
        transpose_parts<S>(rows);
        for (int tap = 0; tap < taps; tap++) store_row<S>(u + t.row(tap, pair, tile), t.part(tile), rows, tap);
      }
    }
  });
}

// Depth are (tap, channel) of an image that is unrolled so.
inline void weights_to_small_unrolled(const Filters<const float>& w, const TileWeights<bfloat16>& t, bfloat16* u) {
  std::fill_n(u, t.size(), bfloat16{});
  for (int64_t k = 0; k < w.K; k++) {
    for (int64_t d = 0; d < taps * w.C; d++) {
      bfloat16* to = u + t.row(0, d / 2, k / tile_columns) + k % tile_columns * 2 + d % 2;
      store(to, splat(*w.at(k, d % w.C, d / w.C)), 1);
    }
  }
}

// To the pixels of each parity of the large side, of which there are four kinds (phases): depth are the filters of the four
// taps that reach them, columns the channels. Phases are `t.size()` apart; which taps those are stands in polyphase.h.
template <class S>
void weights_to_large(const Filters<const float>& w, const TileWeights<S>& t, bfloat16* u) {
  parallel(t.steps * 4, [&](int64_t task) {
    int64_t first = task * tile_rows / 4;
    Rows<S> rows;
    auto store_tap = [&](int64_t tap, int64_t pair, int64_t tile, int row) __attribute__((always_inline)) {
      int64_t y = 3 - tap / 4, x = 3 - tap % 4, phase = y % 2 * 2 + x % 2;
      store_row<S>(u + phase * t.size() + t.row(y / 2 * 2 + x / 2, pair, tile), t.part(tile), rows, row);
    };
    for (int64_t pair = first; pair < first + tile_rows / 4; pair++) {
      int64_t k = 2 * pair;
      if (w.channels_last) {
        for (int64_t tap = 0; tap < taps; tap++) {
          for (int64_t tile = 0; tile < t.tiles; tile++) {
            int64_t c = tile * tile_columns;
            pair_row<S>(rows, 0, channels_at(w, k, c, tap), channels_at(w, k + 1, c, tap));
            store_tap(tap, pair, tile, 0);
          }
        }
      } else {
        for (int64_t tile = 0; tile < t.tiles; tile++) {
          for (int i = 0; i < tile_columns; i++) {
            int64_t c = tile * tile_columns + i;
            pair_row<S>(rows, i, taps_at(w, k, c), taps_at(w, k + 1, c));
          }
          transpose_parts<S>(rows);
          for (int tap = 0; tap < taps; tap++) store_tap(tap, pair, tile, tap);
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
