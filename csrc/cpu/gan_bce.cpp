// gan_bce: one pass over each half of the logits. A batch has tens of them, so doubles cost nothing and need no vectors.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace fastgan::cpu {
namespace {

using torch::headeronly::ScalarType;

double at(const void* data, ScalarType type, int64_t i) {
  if (type == ScalarType::Double) return static_cast<const double*>(data)[i];
  if (type == ScalarType::Float) return static_cast<const float*>(data)[i];
  uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// -log(sigmoid(x)), for any x: never the logarithm of something rounded to 0.
double minus_log_sigmoid(double x) { return std::max(-x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// stats[0], stats[2] = mean loss and mean sigmoid of one half; returns the gradient of the loss by the logits.
template <class T>
Tensor half(const Tensor& logits, double target, T* stats) {
  ScalarType type = logits.scalar_type(), result = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(logits.is_cpu() && logits.is_contiguous() && logits.numel() > 0,
                  "gan_bce: logits must be a contiguous CPU tensor that is not empty");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
                  "gan_bce: logits must be float32, bfloat16 or float64");
  int64_t n = logits.numel();
  Tensor gradient = torch::stable::new_empty(logits, shape_of(logits), result);
  T* out = static_cast<T*>(gradient.mutable_data_ptr());
  double loss = 0, mean = 0;
  for (int64_t i = 0; i < n; i++) {
    double x = at(logits.const_data_ptr(), type, i), p = 1 / (1 + std::exp(-x));
    if (target != 0) loss += target * minus_log_sigmoid(x);
    if (target != 1) loss += (1 - target) * minus_log_sigmoid(-x);
    mean += p;
    out[i] = static_cast<T>((p - target) / static_cast<double>(n));
  }
  stats[0] = static_cast<T>(loss / static_cast<double>(n)), stats[2] = static_cast<T>(mean / static_cast<double>(n));
  return gradient;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> both(const std::optional<Tensor>& real, const std::optional<Tensor>& fake,
                                        double real_target, double fake_target, ScalarType result) {
  const Tensor& some = real ? *real : *fake;
  Tensor stats = torch::stable::new_zeros(some, {4}, result), none = torch::stable::new_empty(some, {0}, result);
  T* out = static_cast<T*>(stats.mutable_data_ptr());
  Tensor grad_real = real ? half<T>(*real, real_target, out) : none;
  Tensor grad_fake = fake ? half<T>(*fake, fake_target, out + 1) : torch::stable::new_empty(some, {0}, result);
  return {stats, grad_real, grad_fake};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gan_bce(std::optional<Tensor> real, std::optional<Tensor> fake, double real_target,
                                           double fake_target) {
  STD_TORCH_CHECK(real || fake, "gan_bce: expected real logits, fake logits or both");
  if ((real ? *real : *fake).scalar_type() == ScalarType::Double) {
    return both<double>(real, fake, real_target, fake_target, ScalarType::Double);
  }
  return both<float>(real, fake, real_target, fake_target, ScalarType::Float);
}

}  // namespace fastgan::cpu
