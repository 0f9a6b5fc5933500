// One SIMD register of T, for whichever instruction set a *.isa.cpp file is compiled for. Arithmetic, comparison and
// `mask ? a : b` are the compiler's vector extensions; only what they cannot say is wrapped here.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // registers never cross a function that is not inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the intrinsics' own undefined operands

#define FASTGAN_INLINE inline __attribute__((always_inline))
#define FASTGAN_UNROLL _Pragma("GCC unroll 32")  // loops over registers, which an index in memory would spill

namespace fastgan::cpu::FASTGAN_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#else
constexpr int vector_bytes = 32;
#endif

template <class T, bool = std::is_floating_point_v<T>>
struct VecType {};  // what is only stored has overloads of `load` and `store` instead
template <class T>
struct VecType<T, true> {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vec = typename VecType<T>::type;
template <class T>
constexpr int lanes = vector_bytes / sizeof(T);

template <class T>
FASTGAN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FASTGAN_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n lanes; the others are 0 (load) or not written (store).
#if defined(__AVX512F__)
FASTGAN_INLINE Vec<float> load(const float* p, int64_t n) {
  return n >= lanes<float> ? load(p) : _mm512_maskz_loadu_ps((1u << n) - 1, p);
}
FASTGAN_INLINE Vec<double> load(const double* p, int64_t n) {
  return n >= lanes<double> ? load(p) : _mm512_maskz_loadu_pd((1u << n) - 1, p);
}
FASTGAN_INLINE void store(float* p, Vec<float> v, int64_t n) {
  n >= lanes<float> ? store(p, v) : _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
}
FASTGAN_INLINE void store(double* p, Vec<double> v, int64_t n) {
  n >= lanes<double> ? store(p, v) : _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
}
#else
template <class T>
FASTGAN_INLINE Vec<T> load(const T* p, int64_t n) {
  if (n >= lanes<T>) return load(p);
  Vec<T> v{};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
}

template <class T>
FASTGAN_INLINE void store(T* p, Vec<T> v, int64_t n) {
  if (n >= lanes<T>) return store(p, v);
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
}
#endif

// The same value in every lane. Spelt out per set: compilers build it from a loop or `{} + x` one lane at a time.
FASTGAN_INLINE Vec<float> splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Vec<float>{x, x, x, x, x, x, x, x};
#endif
}

FASTGAN_INLINE Vec<double> splat(double x) {
#if defined(__AVX512F__)
  return _mm512_set1_pd(x);
#elif defined(__AVX2__)
  return _mm256_set1_pd(x);
#else
  return Vec<double>{x, x, x, x};
#endif
}

// a * b + c, in one rounding where the set has it: explicit, because the forward and the backward pass must
// compute an activation's sign by the same instructions.
FASTGAN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

FASTGAN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace fastgan::cpu::FASTGAN_ISA
