#include "cuda/gan_bce.h"

#include "cuda/checks.h"
#include "cuda/operators.h"

namespace fastgan::cuda {
namespace {

BceHalf check_half(const char* name, const std::optional<Tensor>& logits, const Tensor& first, double target, Tensor& grad) {
  if (!logits) return {nullptr, 0, 0., grad.mutable_data_ptr<float>()};
  check_cuda("gan_bce", name, *logits, first);
  STD_TORCH_CHECK(logits->scalar_type() == first.scalar_type(), "gan_bce: both halves must have the same dtype");
  STD_TORCH_CHECK(logits->is_contiguous() && logits->numel() > 0, "gan_bce: ", name,
                  " must be contiguous and not empty, got ", shape_of(*logits));
  return {logits->const_data_ptr(), logits->numel(), target, grad.mutable_data_ptr<float>()};
}

Tensor gradient_of(const std::optional<Tensor>& logits, const Tensor& first) {
  if (!logits) return torch::stable::new_empty(first, {0}, ScalarType::Float);
  return torch::stable::new_empty(*logits, logits->sizes(), ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gan_bce(std::optional<Tensor> real, std::optional<Tensor> fake, double real_target,
                                           double fake_target) {
  STD_TORCH_CHECK(real || fake, "gan_bce: expected real_logits, fake_logits or both, got neither");
  const Tensor& first = real ? *real : *fake;
  Element element = element_of("gan_bce", "logits", first);
  STD_TORCH_CHECK(first.is_cuda(), "gan_bce: logits must be on a CUDA device");
  torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  Tensor stats = torch::stable::new_empty(first, {4}, ScalarType::Float);
  Tensor grad_real = gradient_of(real, first), grad_fake = gradient_of(fake, first);
  BceHalf real_half = check_half("real_logits", real, first, real_target, grad_real);
  BceHalf fake_half = check_half("fake_logits", fake, first, fake_target, grad_fake);
  check_launch(gan_bce(element, real_half, fake_half, stats.mutable_data_ptr<float>(), current_stream(first)));
  return {stats, grad_real, grad_fake};
}

}  // namespace fastgan::cuda
