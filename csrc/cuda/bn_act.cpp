#include "cuda/bn_act.h"

#include "cuda/checks.h"
#include "cuda/operators.h"

namespace fastgan::cuda {
namespace {

bool is_channels_last(const Tensor& y) {
  if (y.dim() != 4) return false;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (y.size(d) != 1 && y.stride(d) != expected) return false;
    expected *= y.size(d);
  }
  return true;
}

BnShape shape_of_input(const char* operation, const Tensor& y) {
  STD_TORCH_CHECK(y.is_cuda(), operation, ": y must be on a CUDA device");
  STD_TORCH_CHECK(y.dim() >= 2 && y.numel() > 0, operation, ": y must be [N, C, ...] and not empty, got ", shape_of(y));
  int64_t n = y.size(0), channels = y.size(1), hw = y.numel() / (n * channels);
  bool channels_last = is_channels_last(y) || (y.is_contiguous() && hw == 1);
  STD_TORCH_CHECK(channels_last || y.is_contiguous(), operation, ": y must be dense, contiguous or channels-last, got shape ",
                  shape_of(y), " with other strides; call .contiguous() first");
  constexpr int64_t most = int64_t{1} << 31;
  STD_TORCH_CHECK(channels < most && (channels_last || n * hw < most), operation,
                  ": y has 2^31 or more channels, or values in one channel: ", shape_of(y), "; split the batch");
  return {n, channels, hw, channels_last};
}

void check_like(const char* operation, const Tensor& dz, const Tensor& y) {
  check_cuda(operation, "dz", dz, y);
  STD_TORCH_CHECK(dz.scalar_type() == y.scalar_type(), operation, ": dz must have the dtype of y");
  bool same = dz.dim() == y.dim();
  for (int64_t d = 0; same && d < y.dim(); d++) same = dz.size(d) == y.size(d) && (y.size(d) == 1 || dz.stride(d) == y.stride(d));
  STD_TORCH_CHECK(same, operation, ": dz must have the shape and the memory format of y, ", shape_of(y), ", got ", shape_of(dz));
}

BnChannels check_channels(const char* operation, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                          const Tensor& weight, const Tensor& bias) {
  int64_t channels = y.size(1);
  return {per_channel(operation, "mean", mean, y, channels), per_channel(operation, "invstd", invstd, y, channels),
          per_channel(operation, "weight", weight, y, channels), per_channel(operation, "bias", bias, y, channels)};
}

Tensor floats(const Tensor& like, int64_t count) { return torch::stable::new_empty(like, {count}, ScalarType::Float); }

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(const Tensor& y) {
  BnShape shape = shape_of_input("bn_stats", y);
  Element element = element_of("bn_stats", "y", y);
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor mean = floats(y, shape.channels), m2 = floats(y, shape.channels), workspace = floats(y, bn_workspace(shape));
  check_launch(bn_stats(element, shape, y.const_data_ptr(), mean.mutable_data_ptr<float>(), m2.mutable_data_ptr<float>(),
                        workspace.mutable_data_ptr<float>(), current_stream(y)));
  return {mean, m2};
}

Tensor bn_act(const Tensor& y, const Tensor& mean, const Tensor& invstd, const Tensor& weight, const Tensor& bias, double slope) {
  BnShape shape = shape_of_input("bn_act", y);
  Element element = element_of("bn_act", "y", y);
  BnChannels channels = check_channels("bn_act", y, mean, invstd, weight, bias);
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor z = torch::stable::empty_like(y);
  check_launch(bn_act(element, shape, y.const_data_ptr(), channels, static_cast<float>(slope), z.mutable_data_ptr(),
                      current_stream(y)));
  return z;
}

std::tuple<Tensor, Tensor> bn_act_reduce(const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                                         const Tensor& weight, const Tensor& bias, double slope) {
  BnShape shape = shape_of_input("bn_act_reduce", y);
  Element element = element_of("bn_act_reduce", "y", y);
  check_like("bn_act_reduce", dz, y);
  BnChannels channels = check_channels("bn_act_reduce", y, mean, invstd, weight, bias);
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor grad_weight = floats(y, shape.channels), grad_bias = floats(y, shape.channels);
  Tensor workspace = floats(y, bn_workspace(shape));
  check_launch(bn_act_reduce(element, shape, dz.const_data_ptr(), y.const_data_ptr(), channels, static_cast<float>(slope),
                             grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>(),
                             workspace.mutable_data_ptr<float>(), current_stream(y)));
  return {grad_weight, grad_bias};
}

Tensor bn_act_backward(const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd, const Tensor& weight,
                       const Tensor& bias, double slope, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, int64_t count) {
  BnShape shape = shape_of_input("bn_act_backward", y);
  Element element = element_of("bn_act_backward", "y", y);
  check_like("bn_act_backward", dz, y);
  BnChannels channels = check_channels("bn_act_backward", y, mean, invstd, weight, bias);
  STD_TORCH_CHECK(count == 0 || (grad_weight && grad_bias),
                  "bn_act_backward: grad_weight and grad_bias are needed unless count is 0, got count ", count);
  const float *sum_weight = nullptr, *sum_bias = nullptr;
  if (count != 0) {
    sum_weight = per_channel("bn_act_backward", "grad_weight", *grad_weight, y, shape.channels);
    sum_bias = per_channel("bn_act_backward", "grad_bias", *grad_bias, y, shape.channels);
  }
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Tensor dy = torch::stable::empty_like(y);
  check_launch(bn_act_backward(element, shape, dz.const_data_ptr(), y.const_data_ptr(), channels, static_cast<float>(slope),
                               sum_weight, sum_bias, count, dy.mutable_data_ptr(), current_stream(y)));
  return dy;
}

}  // namespace fastgan::cuda
