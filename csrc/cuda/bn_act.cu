#include "cuda/bn_act.h"

#include "cuda/dispatch.cuh"
#include "cuda/normalise.cuh"

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

}  // namespace

int64_t bn_workspace(BnShape shape) {
  int64_t partials = 0;  // whichever of the vectors of the element types will fit
  for (int vector : {1, Vector<float>::size, Vector<__half>::size}) partials = max(partials, int64_t{partials_of(shape, vector)});
  return partials * shape.channels * (sizeof(Total) / sizeof(float));
}

int bn_stats(Element element, BnShape shape, const void* y, float* mean, float* m2, float* workspace, void* stream) {
  return by_element(element, [&]<class T>() {
    Statistics<T> operation{static_cast<const T*>(y), shape, mean, m2};
    if (vectors_fit(y)) return launch_reduce<Vector<T>::size>(operation, shape, workspace, stream);
    return launch_reduce<1>(operation, shape, workspace, stream);
  });
}

int bn_act(Element element, BnShape shape, const void* y, BnChannels channels, float slope, void* z, void* stream) {
  return by_element(element, [&]<class T>() {
    Apply<T> operation{static_cast<const T*>(y), channels, slope, static_cast<T*>(z)};
    if (vectors_fit(y, z)) return launch_map<Vector<T>::size>(operation, shape, stream);
    return launch_map<1>(operation, shape, stream);
  });
}

}  // namespace fastgan::cuda
