// What every kernel here starts from: CUDA, or the host SIMT runtime in its place; element types, 16-byte accesses,
// the launch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef FASTGAN_SIMT
#include "simt/cuda.h"
#define FASTGAN_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (simt::launch(#kernel, kernel, grid, block, shared, __VA_ARGS__), static_cast<void>(stream), 0)
#define FASTGAN_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(simt::dynamic_shared())
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// An expression: 0, or the cudaError_t of the launch.
#define FASTGAN_LAUNCH(kernel, grid, block, shared, stream, ...)                           \
  (kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__),        \
   static_cast<int>(cudaGetLastError()))
#define FASTGAN_DYNAMIC_SHARED(type, name)          \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#endif

#include "activation.h"

namespace fastgan::cuda {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warp = 32;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) {
  return __float2bfloat16_rn(v);
}

// 16 bytes of elements, moved by one load or store; the address must be a multiple of 16.
template <class T>
struct __align__(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T v[size];
};

// The host compiler may split or merge a vector access before the runtime sees it, so it is announced.
__device__ __forceinline__ void announce_vector([[maybe_unused]] const void* p, [[maybe_unused]] bool write) {
#ifdef FASTGAN_SIMT
  simt::vector_access(p, 16, write);
#endif
}

// Where a loop from `first` to `end` begins: on the host a test may leave out all turns but the last.
__device__ __forceinline__ int64_t first_turn(int64_t first, [[maybe_unused]] int64_t end, [[maybe_unused]] int64_t step) {
#ifdef FASTGAN_SIMT
  return simt::first_turn(first, end, step);
#else
  return first;
#endif
}

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  announce_vector(p, false);
  uint4 raw = *reinterpret_cast<const uint4*>(p);
  Vector<T> vector;
  memcpy(&vector, &raw, sizeof vector);
  return vector;
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& vector) {
  announce_vector(p, true);
  uint4 raw;
  memcpy(&raw, &vector, sizeof raw);
#ifdef FASTGAN_SIMT
  *reinterpret_cast<uint4*>(p) = raw;
#else  // the compiler may split an assignment where it cannot prove the alignment, and does
  asm volatile("st.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w) : "memory");
#endif
}

__host__ __device__ constexpr int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace fastgan::cuda
