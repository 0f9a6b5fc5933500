// Tensor-core and asynchronous-copy instructions: PTX on the device (sm_80 and later), collectives on the host.
#pragma once
#include "cuda/device.cuh"

#ifdef FASTGAN_SIMT
#include "simt/tensor_core.h"
#endif

namespace fastgan::cuda {

// d += a * b on fragments of 16x16, 16x8 and 16x8, accumulated in fp32. The whole warp takes part.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef FASTGAN_SIMT
  simt::MmaArguments mine{d, a, b};
  simt::collective(all_lanes, "mma", simt::Site::current(), &mine, simt::mma_m16n8k16<T>);
#elif __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane 8 i + r gives the address of row r of matrix i.
template <bool transposed>
__device__ __forceinline__ void ldmatrix_x4(unsigned (&result)[4], const void* row) {
#ifdef FASTGAN_SIMT
  announce_vector(row, false);
  simt::LdmatrixArguments mine{result, {}};
  for (int i = 0; i < 8; i++) mine.row[i] = static_cast<const uint16_t*>(row)[i];
  simt::collective(all_lanes, "ldmatrix", simt::Site::current(), &mine, simt::ldmatrix_x4<transposed>);
#else
  auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
#endif
}

// Starts to copy 16 bytes into shared memory, or zeros when not valid (then `global` is not read).
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
#ifdef FASTGAN_SIMT
  simt::async_copy(shared, global, 16, valid);
#elif __CUDA_ARCH__ >= 800
  auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Closes the group of the copies started since the last one.
__device__ __forceinline__ void commit_copies() {
#ifdef FASTGAN_SIMT
  simt::async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `left` of this thread's groups are under way.
template <int left>
__device__ __forceinline__ void wait_copies() {
#ifdef FASTGAN_SIMT
  simt::async_wait(left);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

}  // namespace fastgan::cuda
