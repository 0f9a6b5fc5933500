#include "cuda/conv_bn_act.h"

#include "cuda/checks.h"
#include "cuda/operators.h"

namespace fastgan::cuda {
namespace {

constexpr int64_t most = int64_t{1} << 31;

int check_positive(const char* operation, const char* name, int64_t value, int64_t least) {
  STD_TORCH_CHECK(value >= least && value < most, operation, ": ", name, " must be at least ", least, ", got ", value);
  return static_cast<int>(value);
}

// What both operators share: checks, the launch of every phase, the statistics.
std::tuple<Tensor, Tensor, Tensor> run(const char* operation, const Tensor& x, const Tensor& weight,
                                       const std::vector<ConvShape>& phases, const std::optional<Tensor>& mean,
                                       const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, double slope) {
  const ConvShape& first = phases[0];
  Element element = element_of(operation, "x", x);
  STD_TORCH_CHECK(element != Element::f32, operation, ": x must be float16 or bfloat16, got float32");
  STD_TORCH_CHECK(first.h.output > 0 && first.w.output > 0, operation, ": the output would be empty: ", first.h.output, " x ",
                  first.w.output);
  int device = x.get_device_index(), major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_TORCH_CHECK(major >= 8, operation, ": needs compute capability 8.0 or later, this device has ", major, ".x");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
                  operation, ": x and weight must start at a multiple of 16 bytes; clone() the view");
  ConvPrologue prologue{nullptr, nullptr, nullptr, static_cast<float>(slope)};
  if (mean) {
    STD_TORCH_CHECK(scale && bias, operation, ": mean, scale and bias are given together or not at all");
    prologue.mean = per_channel(operation, "mean", *mean, x, first.in_channels);
    prologue.scale = per_channel(operation, "scale", *scale, x, first.in_channels);
    prologue.bias = per_channel(operation, "bias", *bias, x, first.in_channels);
  }
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = torch::stable::new_empty(x, {first.n, first.h.output, first.w.output, first.out_channels});
  Tensor out_mean = torch::stable::new_empty(x, {first.out_channels}, ScalarType::Float);
  Tensor out_m2 = torch::stable::new_empty(x, {first.out_channels}, ScalarType::Float);
  int parts = 0, done = 0;
  for (const ConvShape& phase : phases) parts += conv_parts(phase);
  Tensor partials = torch::stable::new_empty(x, {parts, first.out_channels, 4}, ScalarType::Float);
  auto* workspace = partials.mutable_data_ptr<float>();
  void* stream = current_stream(x);
  for (const ConvShape& phase : phases) {
    check_launch(conv_forward(element, phase, x.const_data_ptr(), weight.const_data_ptr(), prologue, y.mutable_data_ptr(),
                              workspace + int64_t{done} * first.out_channels * 4, stream));
    done += conv_parts(phase);
  }
  check_launch(conv_statistics(workspace, parts, first.out_channels, out_mean.mutable_data_ptr<float>(),
                               out_m2.mutable_data_ptr<float>(), stream));
  return {y, out_mean, out_m2};
}

void check_tensors(const char* operation, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4 && x.is_contiguous() && x.numel() > 0, operation,
                  ": x must be contiguous [N, H, W, C] on a CUDA device and not empty, got ", shape_of(x));
  check_cuda(operation, "weight", weight, x);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), operation, ": weight must have the dtype of x");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.size(3) == x.size(3), operation,
                  ": weight must be contiguous [K, R, S, C] with C = ", x.size(3), ", got ", shape_of(weight));
  STD_TORCH_CHECK(x.size(3) % 8 == 0, operation, ": C must be a multiple of 8, got ", x.size(3));
  for (int64_t d = 0; d < 4; d++)
    STD_TORCH_CHECK(x.size(d) < most && weight.size(d) < most, operation, ": a size is 2^31 or more: ", shape_of(x));
}

int size_of(const Tensor& t, int64_t d) { return static_cast<int>(t.size(d)); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_stats(const Tensor& x, const Tensor& weight, std::optional<Tensor> mean,
                                              std::optional<Tensor> scale, std::optional<Tensor> bias, double slope,
                                              int64_t stride, int64_t padding, int64_t dilation) {
  check_tensors("conv_stats", x, weight);
  int s = check_positive("conv_stats", "stride", stride, 1), p = check_positive("conv_stats", "padding", padding, 0);
  int d = check_positive("conv_stats", "dilation", dilation, 1);
  auto axis = [&](int64_t i) { return conv_axis(size_of(x, i), size_of(weight, i), s, p, d); };
  return run("conv_stats", x, weight, {{size_of(x, 0), size_of(x, 3), size_of(weight, 0), axis(1), axis(2)}}, mean, scale, bias,
             slope);
}

std::tuple<Tensor, Tensor, Tensor> conv_transpose_stats(const Tensor& x, const Tensor& weight, std::optional<Tensor> mean,
                                                        std::optional<Tensor> scale, std::optional<Tensor> bias, double slope,
                                                        int64_t stride, int64_t padding, int64_t output_padding) {
  check_tensors("conv_transpose_stats", x, weight);
  int s = check_positive("conv_transpose_stats", "stride", stride, 1);
  int p = check_positive("conv_transpose_stats", "padding", padding, 0);
  int extra = check_positive("conv_transpose_stats", "output_padding", output_padding, 0);
  auto axis = [&](int64_t i, int phase) { return transposed_axis(size_of(x, i), size_of(weight, i), s, p, extra, phase); };
  std::vector<ConvShape> phases;
  for (int h = 0; h < s; h++)
    for (int w = 0; w < s; w++)
      phases.push_back({size_of(x, 0), size_of(x, 3), size_of(weight, 0), axis(1, h), axis(2, w)});
  return run("conv_transpose_stats", x, weight, phases, mean, scale, bias, slope);
}

}  // namespace fastgan::cuda
