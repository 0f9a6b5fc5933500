#include "cpu/gan_bce.h"

#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace fastgan::cpu {
namespace {

// One of the two, with its places in `stats` and its gradient.
Half half(const Tensor& logits, const Tensor& some, double target, const Tensor& stats, int64_t which, const Tensor& gradient) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.is_contiguous() && logits.numel() > 0,
                  "gan_bce: logits must be a contiguous CPU tensor that is not empty");
  STD_TORCH_CHECK(logits.scalar_type() == some.scalar_type(), "gan_bce: real and fake logits must have the same dtype");
  char* out = static_cast<char*>(stats.mutable_data_ptr()) + which * static_cast<int64_t>(stats.element_size());
  return {logits.const_data_ptr(), logits.numel(), target, out, gradient.mutable_data_ptr()};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gan_bce(std::optional<Tensor> real, std::optional<Tensor> fake, double real_target,
                                           double fake_target) {
  STD_TORCH_CHECK(real || fake, "gan_bce: expected real logits, fake logits or both");
  const Tensor& some = real ? *real : *fake;
  Tensor stats = make_zeros({4}, stat_type(some));
  auto gradient_of = [&](const std::optional<Tensor>& logits) {
    return make_empty(logits ? shape_of(*logits) : Shape{0}, stat_type(some));
  };
  Tensor grad_real = gradient_of(real), grad_fake = gradient_of(fake);
  Half halves[2];
  int64_t count = 0;
  if (real) halves[count++] = half(*real, some, real_target, stats, 0, grad_real);
  if (fake) halves[count++] = half(*fake, some, fake_target, stats, 1, grad_fake);
  FASTGAN_DISPATCH_WIDE(run_gan_bce(storage_of("gan_bce", "logits", some), halves, count));
  return {stats, grad_real, grad_fake};
}

}  // namespace fastgan::cpu
