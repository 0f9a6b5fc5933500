// One kernel per checker with a planted bug, each beside its mended twin: `broken` selects. The runtime must report the
// first and nothing for the second (tests/test_simt.py).
#include "simt/selftest.h"

#include "cuda/device.cuh"
#include "cuda/tensor_core.cuh"

namespace fastgan::simt_selftest {
namespace {

using cuda::all_lanes;

__global__ void shared_race(int* y, bool broken) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  if (!broken) __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void shared_overwrite(int* y, bool broken) {  // a reader may still be at work
  __shared__ int s[64];
  for (int i = 0; i < 2; i++) {
    s[threadIdx.x] = i;
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
    if (!broken) __syncthreads();
  }
}

__global__ void warp_race(int* y, bool broken) {  // lanes of one warp need an order too
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  if (!broken) __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void partial_warp_order(int* y, bool broken) {  // a meeting orders only the lanes that met
  __shared__ int s[64];
  int lane = threadIdx.x % 32;
  s[threadIdx.x] = threadIdx.x;
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  y[threadIdx.x] = s[threadIdx.x ^ (broken ? 16 : 1)];
}

__global__ void global_race(int* y, bool broken) {
  y[threadIdx.x] = threadIdx.x;
  if (!broken) __syncthreads();
  y[64 + threadIdx.x] = y[63 - threadIdx.x];
}

__global__ void block_race(int* y, bool broken) { y[threadIdx.x + (broken ? 0 : 64 * blockIdx.x)] = blockIdx.x; }

__global__ void block_read(int* y, bool broken) {  // reads what another block writes
  int other = broken ? 1 - blockIdx.x : blockIdx.x;
  y[blockIdx.x * 64 + threadIdx.x] += 1;
  __syncthreads();
  if (y[other * 64 + 63 - threadIdx.x] < 0) y[blockIdx.x * 64 + threadIdx.x] = 0;
}

__global__ void atomic_mix(int* y, bool broken) {
  atomicAdd(y, 1);
  if (broken && threadIdx.x == 0) y[0] = 0;
}

__global__ void unwritten_shared(int* y, bool broken) {
  __shared__ int s[64];
  if (!broken || threadIdx.x % 2) s[threadIdx.x] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void unwritten_global(int* y, bool broken) {  // the second half of y starts unwritten
  if (!broken) y[64 + threadIdx.x] = 1;
  y[threadIdx.x] = y[64 + threadIdx.x];
}

__global__ void read_out_of_bounds(int* y, bool broken) { y[0 + threadIdx.x] = y[64 + threadIdx.x * (broken ? 2 : 1)]; }

__global__ void write_out_of_bounds(int* y, bool broken) { y[threadIdx.x + (broken ? 128 : 0)] = 1; }

__global__ void dynamic_out_of_bounds(int* y, bool broken) {  // launched with 64 ints
  FASTGAN_DYNAMIC_SHARED(int, s);
  s[threadIdx.x + (broken ? 1 : 0)] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void misaligned(int* y, bool broken) {
  if (threadIdx.x < 8) cuda::store_vector(y + 4 * threadIdx.x + (broken ? 1 : 0), cuda::Vector<int>{{1, 2, 3, 4}});
}

__global__ void vector_race(int* y, bool broken) {
  __shared__ __align__(16) int s[64];
  if (threadIdx.x < 16) cuda::store_vector(s + 4 * threadIdx.x, cuda::Vector<int>{{1, 2, 3, 4}});
  if (!broken) __syncthreads();
  if (threadIdx.x < 16) cuda::store_vector(y + 4 * threadIdx.x, cuda::load_vector(s + 60 - 4 * threadIdx.x));
}

__global__ void vector_out_of_bounds(int* y, bool broken) {
  if (threadIdx.x < 32 + broken) cuda::store_vector(y + 4 * threadIdx.x, cuda::Vector<int>{{1, 2, 3, 4}});
}

__global__ void divergent_barrier(int* y, bool broken) {
  if (threadIdx.x < 32 && broken)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void deadlock(int* y, bool broken) {  // lane 0 waits for lane 1, which waits for everyone
  if (broken && threadIdx.x == 0) __syncwarp(0x3u);
  else __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void lane_outside_mask(int* y, bool broken) {
  y[threadIdx.x] = __shfl_xor_sync(broken ? 0xffffu : all_lanes, 1, 1);
}

__global__ void lane_has_left(int* y, bool broken) {
  if (threadIdx.x == 5) return;
  y[threadIdx.x] = __shfl_down_sync(broken || threadIdx.x >= 32 ? all_lanes : all_lanes & ~(1u << 5), 1, 0);
}

__global__ void shuffle_source(int* y, bool broken) {
  if (threadIdx.x % 32 < 8) y[threadIdx.x] = __shfl_down_sync(0xffu, 1, broken ? 8 : 0);
}

__global__ void different_collectives(int* y, bool broken) {
  if (threadIdx.x % 2 && broken)
    y[threadIdx.x] = __shfl_xor_sync(all_lanes, 1, 0);
  else
    y[threadIdx.x] = __shfl_xor_sync(all_lanes, 2, 0) + (broken ? 0 : 1);
}

__global__ void missing_wait(int* y, bool broken) {
  __shared__ __align__(16) int s[64];
  if (threadIdx.x < 16) cuda::copy_async_16(s + 4 * threadIdx.x, y + 64 + 4 * threadIdx.x, true);
  cuda::commit_copies();
  if (!broken) cuda::wait_copies<0>();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
  cuda::wait_copies<0>();
}

__global__ void wait_without_barrier(int* y, bool broken) {  // a wait covers only the waiting thread's own copies
  __shared__ __align__(16) int s[64];
  if (threadIdx.x < 16) cuda::copy_async_16(s + 4 * threadIdx.x, y + 64 + 4 * threadIdx.x, true);
  cuda::commit_copies();
  cuda::wait_copies<0>();
  if (!broken) __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void wrong_group(int* y, bool broken) {  // two groups under way, the first is used
  __shared__ __align__(16) int s[2][64];
  for (int i = 0; i < 2; i++) {
    if (threadIdx.x < 16) cuda::copy_async_16(s[i] + 4 * threadIdx.x, y + 64 + 4 * threadIdx.x, true);
    cuda::commit_copies();
  }
  if (broken) cuda::wait_copies<2>();
  else cuda::wait_copies<1>();
  __syncthreads();
  y[threadIdx.x] = s[0][threadIdx.x];
  cuda::wait_copies<0>();
}

__global__ void abandoned_copy(int* y, bool broken) {
  __shared__ __align__(16) int s[64];
  if (threadIdx.x < 16) cuda::copy_async_16(s + 4 * threadIdx.x, y + 64 + 4 * threadIdx.x, true);
  cuda::commit_copies();
  if (!broken) cuda::wait_copies<0>();
}

#define KERNEL(name, blocks) {#name, {[](int* y, bool broken) { FASTGAN_LAUNCH(name, blocks, 64, 256, nullptr, y, broken); }}}

const std::map<std::string, Launcher> all{
    KERNEL(shared_race, 1),          KERNEL(shared_overwrite, 1),     KERNEL(warp_race, 1),
    KERNEL(partial_warp_order, 1),   KERNEL(global_race, 1),          KERNEL(block_race, 2),
    KERNEL(block_read, 2),           KERNEL(atomic_mix, 2),           KERNEL(unwritten_shared, 1),
    KERNEL(unwritten_global, 1),     KERNEL(read_out_of_bounds, 1),   KERNEL(write_out_of_bounds, 1),
    KERNEL(dynamic_out_of_bounds, 1), KERNEL(misaligned, 1),          KERNEL(divergent_barrier, 1),
    KERNEL(deadlock, 1),             KERNEL(lane_outside_mask, 1),    KERNEL(lane_has_left, 1),
    KERNEL(shuffle_source, 1),       KERNEL(different_collectives, 1), KERNEL(missing_wait, 1),
    KERNEL(vector_race, 1), KERNEL(vector_out_of_bounds, 1), KERNEL(wait_without_barrier, 1), KERNEL(wrong_group, 1),          KERNEL(abandoned_copy, 1),
};

}  // namespace

const std::map<std::string, Launcher>& kernels() { return all; }

}  // namespace fastgan::simt_selftest
