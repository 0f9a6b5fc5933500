// The activation of a block, phi, shared by the CUDA kernels and the host SIMT runtime;
// csrc/cpu/block.h has the same on registers.
// slope 0 is ReLU, 1 the identity, anything else LeakyReLU; as in PyTorch, NaN stays NaN and ReLU maps -inf to 0.
#pragma once

#if defined(__CUDACC__)
#define FASTGAN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTGAN_HOST_DEVICE inline
#endif

namespace fastgan {

// phi(v)
template <class T>
FASTGAN_HOST_DEVICE T activate(T v, T slope) {
  if (v > T(0)) return v;
  return slope == T(0) && v == v ? T(0) : slope * v;
}

// dz * phi'(v)
template <class T>
FASTGAN_HOST_DEVICE T activate_backward(T dz, T v, T slope) {
  if (v > T(0)) return dz;
  return slope == T(0) ? T(0) : slope * dz;
}

}  // namespace fastgan
