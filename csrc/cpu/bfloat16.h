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

inline float widened(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline bfloat16 narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded)};
}

#if defined(__AVX512BF16__)
// bf16 in memory, float in registers. The instruction that narrows takes denormal numbers for 0, as those that multiply do.
FASTGAN_INLINE Vec<float> load(const bfloat16* p, int64_t n = lanes<float>) {
  __mmask16 some = n >= lanes<float> ? 0xffff : (1u << n) - 1;
  return Vec<float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
}

FASTGAN_INLINE __m256i narrowed(Vec<float> v) { return __m256i(_mm512_cvtneps_pbh(v)); }

FASTGAN_INLINE void store(bfloat16* p, Vec<float> v, int64_t n = lanes<float>) {
  __mmask16 some = n >= lanes<float> ? 0xffff : (1u << n) - 1;
  _mm256_mask_storeu_epi16(p, some, narrowed(v));
}

FASTGAN_INLINE Vec<float> as_stored(const bfloat16*, Vec<float> v) {
  return Vec<float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(v)), 16));
}

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
  return Vec<float>(_mm512_or_si512(_mm512_cvtepu16_epi32(narrowed(a)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(b)), 16)));
}
#endif

}  // namespace fastgan::cpu::FASTGAN_ISA
