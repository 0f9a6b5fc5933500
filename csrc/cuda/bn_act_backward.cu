#include "cuda/bn_act.h"

#include "cuda/dispatch.cuh"
#include "cuda/normalise.cuh"

namespace fastgan::cuda {
namespace {

template <int V, class T>
struct Pair {
  Elements<V, T> dz, y;
};

template <class T>
struct Reduce {
  const T *dz, *y;
  BnChannels channels;
  float slope;
  float *grad_weight, *grad_bias;

  using Channel = Normalise;
  __device__ Channel channel(int c) const { return normalise(channels, c); }

  template <int V>
  __device__ __forceinline__ Pair<V, T> load(int64_t offset) const {
    return {read<V>(dz + offset), read<V>(y + offset)};
  }

  template <int V, class Channels, class Running>
  __device__ __forceinline__ void add(const Pair<V, T>& pair, Channels&& constants, Running&& running) const {
#pragma unroll
    for (int i = 0; i < V; i++) {
      Channel c = constants(i);
      float y = pair.y[i], g = activate_backward(pair.dz[i], c(y), slope);
      Sums& sums = running(i);  // of g and of g * (y - mean)
      sums.of[0] += g;
      sums.of[1] = fmaf(g, y - c.mean, sums.of[1]);
    }
  }

  __device__ void finish(int c, const Total& total) const {
    float invstd = channels.invstd[c];
    grad_weight[c] = fmaf(invstd, total.rounded.of[1], invstd * total.lost.of[1]);
    grad_bias[c] = total.value().of[0];
  }
};

template <class T>
struct Backward {
  const T *dz, *y;
  BnChannels channels;
  float slope;
  const float *grad_weight, *grad_bias;  // null: constant statistics
  float per_count;                       // 1 / n
  T* dy;

  struct Channel {
    Normalise forward;
    float b, c;  // dy = scale * g + b * (y - mean) + c
  };

  __device__ Channel channel(int c) const {
    Normalise forward = normalise(channels, c);
    if (grad_weight == nullptr) return {forward, 0, 0};
    float s = forward.scale * per_count;
    return {forward, -s * channels.invstd[c] * grad_weight[c], -s * grad_bias[c]};
  }

  template <int V>
  __device__ __forceinline__ Pair<V, T> load(int64_t offset) const {
    return {read<V>(dz + offset), read<V>(y + offset)};
  }

  template <int V, class Channels>
  __device__ __forceinline__ void apply(int64_t offset, const Pair<V, T>& pair, Channels&& constants) const {
    float result[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
      Channel c = constants(i);
      float y = pair.y[i], g = activate_backward(pair.dz[i], c.forward(y), slope);
      float affine = grad_weight == nullptr ? 0.f : fmaf(c.b, y - c.forward.mean, c.c);
      result[i] = fmaf(c.forward.scale, g, affine);
    }
    write<V>(dy + offset, result);
  }
};

}  // namespace

int bn_act_reduce(Element element, BnShape shape, const void* dz, const void* y, BnChannels channels, float slope,
                  float* grad_weight, float* grad_bias, float* workspace, void* stream) {
  return by_element(element, [&]<class T>() {
    Reduce<T> operation{static_cast<const T*>(dz), static_cast<const T*>(y), channels, slope, grad_weight, grad_bias};
    if (vectors_fit(dz, y)) return launch_reduce<Vector<T>::size>(operation, shape, workspace, stream);
    return launch_reduce<1>(operation, shape, workspace, stream);
  });
}

int bn_act_backward(Element element, BnShape shape, const void* dz, const void* y, BnChannels channels, float slope,
                    const float* grad_weight, const float* grad_bias, int64_t count, void* dy, void* stream) {
  return by_element(element, [&]<class T>() {
    bool constant = count == 0;
    Backward<T> operation{static_cast<const T*>(dz), static_cast<const T*>(y), channels, slope,
                          constant ? nullptr : grad_weight, constant ? nullptr : grad_bias,
                          constant ? 0.f : static_cast<float>(1.0 / static_cast<double>(count)), static_cast<T*>(dy)};
    if (vectors_fit(dz, y, dy)) return launch_map<Vector<T>::size>(operation, shape, stream);
    return launch_map<1>(operation, shape, stream);
  });
}

}  // namespace fastgan::cuda
