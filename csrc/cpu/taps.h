// A weight [K, C, 4, 4] in memory, contiguous or channels-last, and registers of it with one filter per lane.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {

constexpr int taps = 16;

template <class T>  // T is const for a weight, not for its gradient
struct Filters {
  T* data;
  int64_t K, C;
  bool channels_last;

  FASTGAN_INLINE T* at(int64_t k, int64_t c, int64_t tap) const {
    return data + k * C * taps + (channels_last ? tap * C + c : c * taps + tap);
  }
};

#if defined(__AVX2__)
#if defined(__AVX512F__)
#define FASTGAN_PS(operation) _mm512_##operation##_ps
#else
#define FASTGAN_PS(operation) _mm256_##operation##_ps
#endif
// As many rows as lanes, transposed in registers: rows[i][j] becomes rows[j][i].
FASTGAN_INLINE void transpose(Vec<float> (&rows)[lanes<float>]) {
  constexpr int n = lanes<float>;
  Vec<float> pairs[n], quads[n];  // transposed within each quarter of four lanes
  FASTGAN_UNROLL for (int i = 0; i < n; i += 2) {
    pairs[i] = FASTGAN_PS(unpacklo)(rows[i], rows[i + 1]), pairs[i + 1] = FASTGAN_PS(unpackhi)(rows[i], rows[i + 1]);
  }
  FASTGAN_UNROLL for (int i = 0; i < n; i += 4) {
    for (int j = 0; j < 2; j++) {
      quads[i + 2 * j] = FASTGAN_PS(shuffle)(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = FASTGAN_PS(shuffle)(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  FASTGAN_UNROLL for (int i = 0; i < 4; i++) {  // the quarters themselves
#if defined(__AVX512F__)
    Vec<float> low[2], high[2];
    for (int j = 0; j < 2; j++) {
      low[j] = _mm512_shuffle_f32x4(quads[8 * j + i], quads[8 * j + i + 4], 0x44);
      high[j] = _mm512_shuffle_f32x4(quads[8 * j + i], quads[8 * j + i + 4], 0xee);
    }
    rows[i] = _mm512_shuffle_f32x4(low[0], low[1], 0x88), rows[i + 4] = _mm512_shuffle_f32x4(low[0], low[1], 0xdd);
    rows[i + 8] = _mm512_shuffle_f32x4(high[0], high[1], 0x88), rows[i + 12] = _mm512_shuffle_f32x4(high[0], high[1], 0xdd);
#else
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
#endif
  }
}
#undef FASTGAN_PS
template <class T>
constexpr bool has_transpose = std::is_same_v<T, float>;
#else
template <class T>
constexpr bool has_transpose = false;
#endif

// Filters c .. c + lanes - 1 of row k, one per lane; beyond the weight they are 0.
template <class T>
FASTGAN_INLINE void load_taps(const Filters<const T>& w, int64_t k, int64_t c, Vec<T> (&tap)[taps]) {
  int64_t n = std::clamp<int64_t>(k < w.K ? w.C - c : 0, 0, lanes<T>);
  if (w.channels_last) {
    for (int t = 0; t < taps; t++) tap[t] = load(w.at(k, c, t), n);
    return;
  }
  if constexpr (has_transpose<T>) {
    if (n == lanes<T>) {
      Vec<T> rows[lanes<T>];
      for (int half = 0; half < taps; half += lanes<T>) {
        for (int i = 0; i < lanes<T>; i++) rows[i] = load(w.at(k, c + i, half));
        transpose(rows);
        for (int i = 0; i < lanes<T>; i++) tap[half + i] = rows[i];
      }
      return;
    }
  }
  T lane[taps][lanes<T>] = {};
  for (int64_t i = 0; i < n; i++) {
    for (int t = 0; t < taps; t++) lane[t][i] = *w.at(k, c + i, t);
  }
  for (int t = 0; t < taps; t++) tap[t] = load(lane[t]);
}

// Asks memory for what load_taps reads, or store_block writes of row k: a few lines far from the next ones, which no processor
// foresees.
template <class T>
FASTGAN_INLINE void prefetch_taps(const Filters<T>& w, int64_t k, int64_t c) {
  if (w.channels_last) {
    for (int t = 0; t < taps; t++) __builtin_prefetch(w.at(k, c, t));
  } else {
    for (int i = 0; i < lanes<std::remove_const_t<T>>; i++) __builtin_prefetch(w.at(k, c + i, 0));
  }
}

// Filters of rows k .. k + lanes - 1, one row per lane, and of as many columns from c on: block[column][tap].
template <class T>
using FilterBlock = Vec<T>[lanes<T>][taps];

// Calls f(column, tap) for each square of `lanes` rows by as many columns (channels-last) or taps that can be
// transposed as a whole; false where the block is not whole.
template <class T, class Value, class F>
FASTGAN_INLINE bool for_squares(const Filters<Value>& w, int64_t k, int64_t c, F f) {
  if (k + lanes<T> > w.K || c + lanes<T> > w.C) return false;
  if (w.channels_last) {
    for (int t = 0; t < taps; t++) f(0, t);
  } else {
    for (int i = 0; i < lanes<T>; i++) {
      for (int half = 0; half < taps; half += lanes<T>) f(i, half);
    }
  }
  return true;
}

template <class T>
void load_block(const Filters<const T>& w, int64_t k, int64_t c, FilterBlock<T>& block) {
  int column = w.channels_last, tap = !w.channels_last;
  if constexpr (has_transpose<T>) {
    if (for_squares<T>(w, k, c, [&](int i, int t) __attribute__((always_inline)) {
          Vec<T> rows[lanes<T>];
          for (int l = 0; l < lanes<T>; l++) rows[l] = load(w.at(k + l, c + i, t));
          transpose(rows);
          for (int l = 0; l < lanes<T>; l++) block[i + l * column][t + l * tap] = rows[l];
        })) {
      return;
    }
  }
  for (int i = 0; i < lanes<T>; i++) {
    for (int t = 0; t < taps; t++) {
      T lane[lanes<T>] = {};
      for (int l = 0; l < lanes<T> && k + l < w.K && c + i < w.C; l++) lane[l] = *w.at(k + l, c + i, t);
      block[i][t] = load(lane);
    }
  }
}

template <class T>
void store_block(const Filters<T>& w, int64_t k, int64_t c, const FilterBlock<T>& block) {
  int column = w.channels_last, tap = !w.channels_last;
  if constexpr (has_transpose<T>) {
    if (for_squares<T>(w, k, c, [&](int i, int t) __attribute__((always_inline)) {
          Vec<T> rows[lanes<T>];
          for (int l = 0; l < lanes<T>; l++) rows[l] = block[i + l * column][t + l * tap];
          transpose(rows);
          for (int l = 0; l < lanes<T>; l++) store(w.at(k + l, c + i, t), rows[l]);
        })) {
      return;
    }
  }
  for (int i = 0; i < lanes<T> && c + i < w.C; i++) {
    for (int t = 0; t < taps; t++) {
      T lane[lanes<T>];
      store(lane, block[i][t]);
      for (int l = 0; l < lanes<T> && k + l < w.K; l++) *w.at(k + l, c + i, t) = lane[l];
    }
  }
}

}  // namespace fastgan::cpu::FASTGAN_ISA
