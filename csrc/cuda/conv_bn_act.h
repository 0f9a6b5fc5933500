// Launcher of the forward convolution with a BatchNorm + activation prologue and a statistics epilogue (channels-last,
// fp16 and bf16, compute capability 8.0 and later). Returns 0 or a cudaError_t.
#pragma once
#include <cstdint>

#include "cuda/element.h"

namespace fastgan::cuda {

// One spatial axis. Output i (of `count`) reads input i * scale + first + tap * step for each tap, and is stored at
// place i * out_scale + out_first; the tap's weight is number weight_first + tap * weight_step.
struct ConvAxis {
  int input, output, weights;  // sizes
  int count, taps, scale, first, step, weight_first, weight_step, out_scale, out_first;
};

// A convolution; `dilation` spreads the taps.
ConvAxis conv_axis(int input, int weights, int stride, int padding, int dilation);
// Phase `phase` (of `stride`) of a transposed convolution: the outputs o = phase mod stride, as a convolution with
// stride 1 by every stride-th weight.
ConvAxis transposed_axis(int input, int weights, int stride, int padding, int output_padding, int phase);

// What happens to the input on its way in: phi(scale * (x - mean) + bias), fp32 [C]; mean null: nothing.
struct ConvPrologue {
  const float *mean, *scale, *bias;
  float slope;
};

struct ConvShape {
  int n, in_channels, out_channels;  // in_channels: a multiple of 8
  ConvAxis h, w;
};

// In how many parts a launch leaves its statistics, each four floats per output channel.
int conv_parts(const ConvShape& shape);

// x [n, h, w, in_channels], weight [out_channels, h.weights, w.weights, in_channels], y [n, h.output, w.output,
// out_channels], partials [conv_parts, out_channels, 4]: statistics of the stored y.
int conv_forward(Element element, const ConvShape& shape, const void* x, const void* weight, ConvPrologue prologue, void* y,
                 float* partials, void* stream);

// Combines the partials of all phases, in order, into mean and m2 [channels].
int conv_statistics(const float* partials, int parts, int channels, float* mean, float* m2, void* stream);

}  // namespace fastgan::cuda
