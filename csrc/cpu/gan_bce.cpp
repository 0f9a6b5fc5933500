#include "cpu/gan_bce.h"

#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace fastgan::cpu {
namespace {

// Fills stats[which] and stats[which + 2]; returns the gradient of the loss by the logits, of no elements without them.
Tensor half(const std::optional<Tensor>& logits, const Tensor& some, double target, const Tensor& stats, int64_t which) {
  if (!logits) return make_empty({0}, stat_type(some));
  STD_TORCH_CHECK(logits->is_cpu() && logits->is_contiguous() && logits->numel() > 0,
                  "gan_bce: logits must be a contiguous CPU tensor that is not empty");
  STD_TORCH_CHECK(logits->scalar_type() == some.scalar_type(), "gan_bce: real and fake logits must have the same dtype");
  Storage type = storage_of("gan_bce", "logits", *logits);
  Tensor gradient = make_empty(shape_of(*logits), stat_type(some));
  char* out = static_cast<char*>(stats.mutable_data_ptr()) + which * (type == Storage::float64 ? 8 : 4);
  FASTGAN_DISPATCH(run_gan_bce(type, logits->const_data_ptr(), logits->numel(), target, out, gradient.mutable_data_ptr()));
  return gradient;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gan_bce(std::optional<Tensor> real, std::optional<Tensor> fake, double real_target,
                                           double fake_target) {
  STD_TORCH_CHECK(real || fake, "gan_bce: expected real logits, fake logits or both");
  const Tensor& some = real ? *real : *fake;
  Tensor stats = make_zeros({4}, stat_type(some));
  Tensor grad_real = half(real, some, real_target, stats, 0), grad_fake = half(fake, some, fake_target, stats, 1);
  return {stats, grad_real, grad_fake};
}

}  // namespace fastgan::cpu
