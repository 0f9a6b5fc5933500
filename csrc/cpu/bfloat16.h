// The upper half of a float, as it is stored.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {

struct bfloat16 {
  uint16_t bits;
};

// bf16 in memory, float in registers.
typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));

FASTGAN_INLINE Vec<float> widened(Halves bits) { return (Vec<float>)(__builtin_convertvector(bits, Words) << 16); }

FASTGAN_INLINE Halves narrowed(Vec<float> v) {
#if defined(__AVX512BF16__)  // takes denormal numbers for 0, as the instructions that multiply do
  return (Halves)_mm512_cvtneps_pbh(v);
#else
  // To nearest, ties to even; NaN stays one.
  Words bits = (Words)v, upper = bits >> 16, rounded = (bits + 0x7fff + (upper & 1)) >> 16;
  return __builtin_convertvector(v != v ? upper | 0x40 : rounded, Halves);
#endif
}

FASTGAN_INLINE Vec<float> load(const bfloat16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return widened(bits);
}

FASTGAN_INLINE void store(bfloat16* p, Vec<float> v) {
  Halves bits = narrowed(v);
  std::memcpy(p, &bits, sizeof bits);
}

FASTGAN_INLINE Vec<float> load(const bfloat16* p, int64_t n) {
  if (n >= lanes<float>) return load(p);
#if defined(__AVX512F__)
  return widened((Halves)_mm256_maskz_loadu_epi16((1u << n) - 1, p));
#else
  Halves bits{};
  std::memcpy(&bits, p, n * sizeof *p);
  return widened(bits);
#endif
}

FASTGAN_INLINE void store(bfloat16* p, Vec<float> v, int64_t n) {
  if (n >= lanes<float>) return store(p, v);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)narrowed(v));
#else
  Halves bits = narrowed(v);
  std::memcpy(p, &bits, n * sizeof *p);
#endif
}

FASTGAN_INLINE Vec<float> as_stored(const bfloat16*, Vec<float> v) { return widened(narrowed(v)); }

#if defined(__AVX512BF16__)
// A float is the sum of three numbers of bf16, 24 digits of eight each. Parts are rounded, so that what is left has either sign
// and small products do not all push a sum one way; only where rounding would overflow is the first cut off. Infinity leaves
// NaN. Denormal parts, and denormal products of parts, count as 0: results below 1e-30 lose digits. What is stored in bf16 is
// one number.
template <class S>
constexpr int parts = std::is_same_v<S, bfloat16> ? 1 : 3;
template <class S>
using Parts = Vec<float>[parts<S>];

template <class S>
FASTGAN_INLINE void split(Vec<float> v, Vec<float> (&part)[parts<S>]) {
  if constexpr (parts<S> == 1) {
    part[0] = v;
  } else {
    Vec<float> cut = Vec<float>(_mm512_and_si512(__m512i(v), _mm512_set1_epi32(-0x10000)));
    Vec<float> near = as_stored(static_cast<const bfloat16*>(nullptr), v), most = splat(std::numeric_limits<float>::max());
    part[0] = near > most ? cut : near < -most ? cut : near;
    Vec<float> rest = v - part[0];
    part[1] = as_stored(static_cast<const bfloat16*>(nullptr), rest);
    part[2] = rest - part[1];
  }
}

// Pairs (a, b) of bf16, one per lane.
FASTGAN_INLINE Vec<float> paired(Vec<float> a, Vec<float> b) {
  return (Vec<float>)(__builtin_convertvector(narrowed(a), Words) | __builtin_convertvector(narrowed(b), Words) << 16);
}
#endif

}  // namespace fastgan::cpu::FASTGAN_ISA
