#include "cuda/bn_act.h"

#include "cuda/channels.cuh"
#include "cuda/dispatch.cuh"

namespace fastgan::cuda {
namespace {

// --- statistics: mean and sum of squared deviations, from sums of y - shift --------------------------------------------

// The shift is the mean of a few values of the channel, spread over it, so that little cancels in sum (y - shift)^2 -
// (sum (y - shift))^2 / n: it is within a fraction of a standard deviation of the mean, and for few values is the mean.
constexpr int shift_samples = 32;

template <class T>
struct Statistics {
  const T* y;
  BnShape shape;
  float *mean, *m2;

  struct Channel {
    float shift;
  };

  __device__ Channel channel(int c) const {
    int64_t count = shape.n * shape.hw, samples = min(count, int64_t{shift_samples});
    float sum = 0;
    for (int64_t s = 0; s < samples; s++) {
      int64_t position = count * s / samples, plane = position / shape.hw;
      int64_t offset = shape.channels_last ? position * shape.channels + c
                                           : (plane * shape.channels + c) * shape.hw + position - plane * shape.hw;
      sum += to_float(y[offset]);
    }
    return {sum / static_cast<float>(samples)};
  }

  template <int V>
  __device__ __forceinline__ Elements<V, T> load(int64_t offset) const {
    return read<V>(y + offset);
  }

  template <int V, class Channels, class Running>
  __device__ __forceinline__ void add(const Elements<V, T>& values, Channels&& constants, Running&& running) const {
#pragma unroll
    for (int i = 0; i < V; i++) {
      Sums& sums = running(i);  // of y - shift and of its square
      float d = values[i] - constants(i).shift;
      sums.of[0] += d;
      sums.of[1] = fmaf(d, d, sums.of[1]);
    }
  }

  __device__ void finish(int c, const Total& total) const {
    Sums sums = total.value();
    float d = sums.of[0] / static_cast<float>(shape.n * shape.hw), deviations = fmaf(-sums.of[0], d, sums.of[1]);
    mean[c] = channel(c).shift + d;
    m2[c] = deviations < 0 ? 0.f : deviations;
  }
};

// --- forward --------------------------------------------------------------------------------------------------------

// v = scale * (y - mean) + bias, by the same instructions forward and backward, so that both see the same sign.
struct Normalise {
  float mean, scale, bias;
  __device__ float operator()(float y) const { return fmaf(scale, y - mean, bias); }
};

__device__ __forceinline__ Normalise normalise(const BnChannels& of, int c) {
  return {of.mean[c], of.weight[c] * of.invstd[c], of.bias[c]};
}

template <class T>
struct Apply {
  const T* y;
  BnChannels channels;
  float slope;
  T* z;

  using Channel = Normalise;
  __device__ Channel channel(int c) const { return normalise(channels, c); }

  template <int V>
  __device__ __forceinline__ Elements<V, T> load(int64_t offset) const {
    return read<V>(y + offset);
  }

  template <int V, class Channels>
  __device__ __forceinline__ void apply(int64_t offset, const Elements<V, T>& values, Channels&& constants) const {
    float result[V];
#pragma unroll
    for (int i = 0; i < V; i++) result[i] = activate(constants(i)(values[i]), slope);
    write<V>(z + offset, result);
  }
};

// --- backward -------------------------------------------------------------------------------------------------------

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

int64_t bn_workspace(BnShape shape) {
  return int64_t{make_grid(shape, 1).partials()} * shape.channels * (sizeof(Total) / sizeof(float));
}

int bn_stats(Element element, BnShape shape, const void* y, float* mean, float* m2, float* workspace, void* stream) {
  return by_element(element, [&]<class T>() {
    Statistics<T> operation{static_cast<const T*>(y), shape, mean, m2};
    if (vectors_fit<T>(shape, y)) return launch_reduce<Vector<T>::size>(operation, shape, workspace, stream);
    return launch_reduce<1>(operation, shape, workspace, stream);
  });
}

int bn_act(Element element, BnShape shape, const void* y, BnChannels channels, float slope, void* z, void* stream) {
  return by_element(element, [&]<class T>() {
    Apply<T> operation{static_cast<const T*>(y), channels, slope, static_cast<T*>(z)};
    if (vectors_fit<T>(shape, y, z)) return launch_map<Vector<T>::size>(operation, shape, stream);
    return launch_map<1>(operation, shape, stream);
  });
}

int bn_act_reduce(Element element, BnShape shape, const void* dz, const void* y, BnChannels channels, float slope,
                  float* grad_weight, float* grad_bias, float* workspace, void* stream) {
  return by_element(element, [&]<class T>() {
    Reduce<T> operation{static_cast<const T*>(dz), static_cast<const T*>(y), channels, slope, grad_weight, grad_bias};
    if (vectors_fit<T>(shape, dz, y)) return launch_reduce<Vector<T>::size>(operation, shape, workspace, stream);
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
    if (vectors_fit<T>(shape, dz, y, dy)) return launch_map<Vector<T>::size>(operation, shape, stream);
    return launch_map<1>(operation, shape, stream);
  });
}

}  // namespace fastgan::cuda
