// Implicit GEMM: rows are output positions, columns output channels, and the sum runs over taps and input channels.
#include "cuda/conv_bn_act.h"

#include "cuda/tensor_core.cuh"
#include "cuda/total.cuh"

namespace fastgan::cuda {
namespace {

constexpr int tile = 64;      // rows and columns of a block
constexpr int depth = 32;     // of the sum, per stage
constexpr int stages = 3;
constexpr int chunk = 8;      // elements of one 16-byte copy
constexpr int row_stride = depth + chunk;  // spreads the rows of a tile over the banks
constexpr int conv_threads = 128;
constexpr int rows_per_thread = tile * depth / chunk / conv_threads;
constexpr int row_step = tile / rows_per_thread;
constexpr int warp_tile = 32;  // four warps, two by two

template <class T>
struct Stage {
  T a[tile][row_stride];  // input, [row][depth]
  T b[tile][row_stride];  // weight, [column][depth]
};

constexpr int result_stride = tile + 1;
constexpr size_t shared_bytes = sizeof(Stage<__half>) * stages;
static_assert(sizeof(float) * tile * result_stride <= shared_bytes);

struct Position {
  int n, h, w;  // counted in outputs of this phase
  bool inside;
};

// Of a part of a channel: how many values, their sum (with what it lost), and the squared deviations from their mean.
struct Moments {
  float count, sum, lost, m2;
  __device__ float mean() const { return count > 0 ? (sum + lost) / count : 0.f; }
};

template <class T>
class Convolution {
  const ConvShape& shape_;
  const T *x_, *weight_;
  const ConvPrologue& prologue_;
  Stage<T>* stage_;
  int chunk_;  // this thread's place in the depth, in elements
  Position position_[rows_per_thread];
  int column_[rows_per_thread];

  struct Step {  // what one stage covers
    int tap_h, tap_w, channel;
  };

  __device__ __forceinline__ Step step(int i) const {
    int per_tap = divide_up(shape_.in_channels, depth), tap = i / per_tap;
    return {tap / shape_.w.taps, tap % shape_.w.taps, (i - tap * per_tap) * depth + chunk_};
  }

  // Where this thread's r-th piece of input lies; null in the padding and beyond the channels.
  __device__ __forceinline__ const T* source(int r, const Step& s) const {
    const Position& p = position_[r];
    int h = p.h * shape_.h.scale + shape_.h.first + s.tap_h * shape_.h.step;
    int w = p.w * shape_.w.scale + shape_.w.first + s.tap_w * shape_.w.step;
    bool inside = p.inside && s.channel < shape_.in_channels && h >= 0 && h < shape_.h.input && w >= 0 && w < shape_.w.input;
    return inside ? x_ + ((int64_t{p.n} * shape_.h.input + h) * shape_.w.input + w) * shape_.in_channels + s.channel : nullptr;
  }

 public:
  __device__ __forceinline__ Convolution(const ConvShape& shape, const T* x, const T* weight, const ConvPrologue& prologue,
                                         Stage<T>* stage)
      : shape_(shape), x_(x), weight_(weight), prologue_(prologue), stage_(stage), chunk_(threadIdx.x % (depth / chunk) * chunk) {
#pragma unroll
    for (int r = 0; r < rows_per_thread; r++) {
      int row = threadIdx.x / (depth / chunk) + r * row_step;
      position_[r] = position(shape, int64_t{blockIdx.x} * tile + row);
      column_[r] = blockIdx.y * tile + row;
    }
  }

  static __device__ __forceinline__ Position position(const ConvShape& shape, int64_t row) {
    int64_t per_image = int64_t{shape.h.count} * shape.w.count, n = row / per_image;
    int rest = static_cast<int>(row - n * per_image);
    return {static_cast<int>(n), rest / shape.w.count, rest % shape.w.count, n < shape.n};
  }

  __device__ __forceinline__ int steps() const { return shape_.h.taps * shape_.w.taps * divide_up(shape_.in_channels, depth); }

  // Starts the copies of stage i, if there is one; closes the group in any case, so that groups count stages.
  __device__ __forceinline__ void copy(int i) const {
    if (i < steps()) {
      Step s = step(i);
      Stage<T>& to = stage_[i % stages];
      int weight_h = shape_.h.weight_first + s.tap_h * shape_.h.weight_step;
      int weight_w = shape_.w.weight_first + s.tap_w * shape_.w.weight_step;
#pragma unroll
      for (int r = 0; r < rows_per_thread; r++) {
        int row = threadIdx.x / (depth / chunk) + r * row_step;
        const T* from = source(r, s);
        copy_async_16(&to.a[row][chunk_], from ? from : x_, from != nullptr);
        bool inside = column_[r] < shape_.out_channels && s.channel < shape_.in_channels;
        int64_t offset = ((int64_t{column_[r]} * shape_.h.weights + weight_h) * shape_.w.weights + weight_w) * shape_.in_channels;
        copy_async_16(&to.b[row][chunk_], inside ? weight_ + offset + s.channel : weight_, inside);
      }
    }
    commit_copies();
  }

  // Applies the prologue to what this thread copied itself. The padding comes after it: what was not copied stays 0.
  __device__ __forceinline__ void transform(int i) const {
    if (prologue_.mean == nullptr) return;
    Step s = step(i);
    if (s.channel >= shape_.in_channels) return;
    float mean[chunk], scale[chunk], bias[chunk];
#pragma unroll
    for (int k = 0; k < chunk; k++) {
      mean[k] = prologue_.mean[s.channel + k];
      scale[k] = prologue_.scale[s.channel + k];
      bias[k] = prologue_.bias[s.channel + k];
    }
#pragma unroll
    for (int r = 0; r < rows_per_thread; r++) {
      if (source(r, s) == nullptr) continue;
      T* at = &stage_[i % stages].a[threadIdx.x / (depth / chunk) + r * row_step][chunk_];
      Vector<T> values = load_vector(at);
#pragma unroll
      for (int k = 0; k < chunk; k++)
        values.v[k] = from_float<T>(activate(fmaf(scale[k], to_float(values.v[k]) - mean[k], bias[k]), prologue_.slope));
      store_vector(at, values);
    }
  }

  __device__ __forceinline__ void multiply(int i, float (&sums)[2][4][4], int warp_row, int warp_column) const {
    const Stage<T>& from = stage_[i % stages];
    int lane = threadIdx.x % warp;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      unsigned a[2][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) ldmatrix_x4<false>(a[m], &from.a[warp_row + m * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int n = 0; n < 2; n++)
        ldmatrix_x4<false>(b[n], &from.b[warp_column + n * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
          unsigned pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma_m16n8k16<T>(sums[m][n], a[m], pair);
        }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(conv_threads) conv(ConvShape shape, const T* x, const T* weight, ConvPrologue prologue, T* y,
                                                     Moments* partials) {
  __shared__ __align__(16) unsigned char memory[shared_bytes];
  Convolution<T> convolution(shape, x, weight, prologue, reinterpret_cast<Stage<T>*>(memory));
  int lane = threadIdx.x % warp, warp_row = threadIdx.x / warp / 2 * warp_tile, warp_column = threadIdx.x / warp % 2 * warp_tile;

  float sums[2][4][4] = {};
  for (int i = 0; i < stages - 1; i++) convolution.copy(i);
  for (int i = 0, steps = convolution.steps(); i < steps; i++) {
    wait_copies<stages - 2>();
    convolution.transform(i);
    __syncthreads();
    convolution.copy(i + stages - 1);  // into the stage that everyone has left
    convolution.multiply(i, sums, warp_row, warp_column);
  }
  wait_copies<0>();
  __syncthreads();

  // The tile as it will be stored, through shared memory, so that stores and sums run along rows and columns.
  auto* result = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        int row = warp_row + m * 16 + lane / 4 + q / 2 * 8, column = warp_column + n * 8 + lane % 4 * 2 + q % 2;
        result[row * result_stride + column] = to_float(from_float<T>(sums[m][n][q]));
      }
  __syncthreads();

  int64_t first_row = int64_t{blockIdx.x} * tile;
  int column = threadIdx.x % tile, channel = blockIdx.y * tile + column;
  int64_t rows = min(int64_t{tile}, int64_t{shape.n} * shape.h.count * shape.w.count - first_row);
  constexpr int share = tile / (conv_threads / tile);  // rows of this thread
  int begin = threadIdx.x / tile * share, end = static_cast<int>(min(int64_t{begin + share}, rows));
  Total total, deviations;
  for (int row = begin; row < end; row++) {
    float value = result[row * result_stride + column];
    total.add(Sums{value});
    if (channel >= shape.out_channels) continue;
    Position p = Convolution<T>::position(shape, first_row + row);
    int h = p.h * shape.h.out_scale + shape.h.out_first, w = p.w * shape.w.out_scale + shape.w.out_first;
    y[((int64_t{p.n} * shape.h.output + h) * shape.w.output + w) * shape.out_channels + channel] = from_float<T>(value);
  }
  Moments mine{static_cast<float>(max(end - begin, 0)), total.rounded.of[0], total.lost.of[0], 0};
  for (int row = begin; row < end; row++) {
    float d = result[row * result_stride + column] - mine.mean();
    deviations.add(Sums{d * d});
  }
  mine.m2 = deviations.value().of[0];
  if (channel < shape.out_channels)
    partials[(int64_t{blockIdx.x} * (conv_threads / tile) + threadIdx.x / tile) * shape.out_channels + channel] = mine;
}

// Two passes over the parts: the mean of all, then every part's deviations from it.
__global__ void __launch_bounds__(conv_threads) conv_moments(const Moments* partials, int parts, int channels, float* mean, float* m2) {
  int channel = blockIdx.x * conv_threads + threadIdx.x;
  if (channel >= channels) return;
  auto part = [&](int i) { return partials[int64_t{i} * channels + channel]; };
  Total sum, deviations;
  float count = 0;
  for (int i = 0; i < parts; i++) {
    Moments p = part(i);
    count += p.count;
    sum.add(Sums{p.sum}, Sums{p.lost});
  }
  float whole = sum.value().of[0] / count;
  for (int i = 0; i < parts; i++) {
    Moments p = part(i);
    if (p.count == 0) continue;
    float apart = fmaf(-p.count, whole, p.sum) + p.lost;  // count * (mean of the part - whole)
    deviations.add(Sums{p.m2, apart * apart / p.count});
  }
  mean[channel] = whole;
  m2[channel] = deviations.value().of[0] + deviations.value().of[1];
}

}  // namespace

ConvAxis conv_axis(int input, int weights, int stride, int padding, int dilation) {
  int output = (input + 2 * padding - dilation * (weights - 1) - 1) / stride + 1;
  return {input, output, weights, output, weights, stride, -padding, dilation, 0, 1, 1, 0};
}

ConvAxis transposed_axis(int input, int weights, int stride, int padding, int output_padding, int phase) {
  int output = (input - 1) * stride - 2 * padding + weights + output_padding;
  int first_weight = (phase + padding) % stride;
  int taps = first_weight < weights ? (weights - first_weight + stride - 1) / stride : 0;
  int count = phase < output ? (output - phase + stride - 1) / stride : 0;
  return {input, output, weights, count, taps, 1, (phase + padding - first_weight) / stride, -1, first_weight, stride, stride, phase};
}

int conv_parts(const ConvShape& shape) {
  return divide_up(int64_t{shape.n} * shape.h.count * shape.w.count, tile) * (conv_threads / tile);
}

int conv_forward(Element element, const ConvShape& shape, const void* x, const void* weight, ConvPrologue prologue, void* y,
                 float* partials, void* stream) {
  dim3 grid(conv_parts(shape) / (conv_threads / tile), divide_up(shape.out_channels, tile));
  if (grid.x == 0) return 0;
  auto launch = [&]<class T>() {
    return FASTGAN_LAUNCH((conv<T>), grid, conv_threads, 0, stream, shape, static_cast<const T*>(x), static_cast<const T*>(weight),
                          prologue, static_cast<T*>(y), reinterpret_cast<Moments*>(partials));
  };
  return element == Element::f16 ? launch.template operator()<__half>() : launch.template operator()<__nv_bfloat16>();
}

int conv_statistics(const float* partials, int parts, int channels, float* mean, float* m2, void* stream) {
  return FASTGAN_LAUNCH(conv_moments, divide_up(channels, conv_threads), conv_threads, 0, stream,
                        reinterpret_cast<const Moments*>(partials), parts, channels, mean, m2);
}

}  // namespace fastgan::cuda
