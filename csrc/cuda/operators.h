// The CUDA operators that registration.cpp registers; the contract is in fastgan/backends.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastgan::cuda {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> bn_stats(const Tensor& y);
Tensor bn_act(const Tensor& y, const Tensor& mean, const Tensor& invstd, const Tensor& weight, const Tensor& bias, double slope);
std::tuple<Tensor, Tensor> bn_act_reduce(const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                                         const Tensor& weight, const Tensor& bias, double slope);
Tensor bn_act_backward(const Tensor& dz, const Tensor& y, const Tensor& mean, const Tensor& invstd, const Tensor& weight,
                       const Tensor& bias, double slope, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, int64_t count);

std::tuple<Tensor, Tensor, Tensor> gan_bce(std::optional<Tensor> real, std::optional<Tensor> fake, double real_target,
                                           double fake_target);

void adam_ema(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> ema_params, const Tensor& step, double lr, double beta1,
              double beta2, double eps, double weight_decay, bool decoupled, double ema_decay);

}  // namespace fastgan::cuda
