// The part of CUDA C++ that the kernels here use, for a host compiler: included instead of the CUDA headers, so that
// the tests need no CUDA toolkit.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>

#include "simt/runtime.h"

#define __global__
#define __device__
#define __host__
// Really inline: the compiler announces no store that a call makes when it returns a struct straight into memory.
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // a storage class of its own, which memory.cpp can tell from everything else

#define threadIdx (simt::self->index)
#define blockIdx (simt::self->block)
#define blockDim (simt::self->block_dim)
#define gridDim (simt::self->grid_dim)

using std::isfinite;
using std::max;
using std::min;

struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};

// --- 16-bit floating point, rounding to nearest even as the hardware does -------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (v != v) return {0x7fff};
  auto bits = std::bit_cast<uint32_t>(v);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half v) {
  uint32_t sign = uint32_t{v.bits} >> 15 << 31, exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal
  return sign ? -magnitude : magnitude;
}

inline __half __float2half_rn(float v) {
  auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(v) >> 16 & 0x8000);
  float magnitude = std::fabs(v);
  if (v != v) return {0x7fff};
  if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
  auto bits = std::bit_cast<uint32_t>(magnitude);
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)))};
}

inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }

// --- meetings -------------------------------------------------------------------------------------------------------

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::barrier(site); }

inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::current()) {
  simt::collective(mask, "__syncwarp", site, nullptr, nullptr);
}

namespace simt {

template <class T>
struct Shuffle {
  T value, result;
  unsigned source;
  Site site;
};

// Every shuffle: `source` is the lane to read.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* what, Site site) {
  Shuffle<T> mine{value, value, source, site};
  collective(mask, what, site, &mine, [](void** lanes, unsigned) {
    for (unsigned l = 0; l < warp_size; l++) {
      auto* me = static_cast<Shuffle<T>*>(lanes[l]);
      if (me == nullptr) continue;
      if (auto* other = static_cast<Shuffle<T>*>(lanes[me->source])) me->result = other->value;
      else report_bad_source(me->source, me->site);
    }
  });
  return mine.result;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane, simt::Site site = simt::Site::current()) {
  return simt::shuffle(mask, value, lane % simt::warp_size, "__shfl_sync", site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, simt::Site site = simt::Site::current()) {
  return simt::shuffle(mask, value, (simt::self->lane ^ bits) % simt::warp_size, "__shfl_xor_sync", site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, simt::Site site = simt::Site::current()) {
  unsigned lane = simt::self->lane;
  return simt::shuffle(mask, value, lane + by < simt::warp_size ? lane + by : lane, "__shfl_down_sync", site);
}

inline unsigned __ballot_sync(unsigned mask, bool vote, simt::Site site = simt::Site::current()) {
  unsigned value = vote;
  simt::collective(mask, "__ballot_sync", site, &value, [](void** lanes, unsigned) {
    unsigned votes = 0;
    for (unsigned l = 0; l < simt::warp_size; l++)
      if (lanes[l] && *static_cast<unsigned*>(lanes[l])) votes |= 1u << l;
    for (void* lane : std::span(lanes, simt::warp_size))
      if (lane) *static_cast<unsigned*>(lane) = votes;
  });
  return value;
}

// --- atomics: only one fiber runs at a time, so that plain code is atomic ---------------------------------------------

namespace simt {
template <class T, class F>
__attribute__((no_sanitize("thread"), noinline)) T atomic(T* p, F change) {
  atomic_access(p, sizeof(T), __builtin_return_address(0));
  T old = *p;
  *p = change(old);
  return old;
}
}  // namespace simt

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return simt::atomic(p, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return simt::atomic(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return simt::atomic(p, [v](T) { return v; });
}
