// The CPU operators that registration.cpp registers.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastgan::cpu {

// The instruction set whose kernels run here: "plain", "avx2", "avx512" or "amx".
std::string instruction_set();

// A 4x4 stride-2 padding-1 convolution with weight [K, C, 4, 4] (contiguous or channels-last) from its large side
// [N, C, 2H, 2W] to its small side [N, K, H, W], or, to_large, its transpose; what is done to operand and result on the way
// stands in block.h. AMX is used under the automatic scheme alone. Returns the result and its sums [2 * sets, channels]:
// `statistics` says of how many equal parts of the batch, 0 for none; with output_y it is as many as its constants
// [4 * sets, channels] are for. A `passing` result is overwritten by the next but one that this thread makes, which the input
// may be.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> convolve(
    torch::stable::Tensor input, std::optional<torch::stable::Tensor> second, std::optional<torch::stable::Tensor> constants,
    double slope, torch::stable::Tensor weight, bool to_large, int64_t height, int64_t width, int64_t statistics,
    std::optional<torch::stable::Tensor> output_y, std::optional<torch::stable::Tensor> output_constants,
    double output_slope, int64_t scheme, bool passing);

// The gradient of that weight from both sides, channels-last if asked for.
torch::stable::Tensor weight_gradient(torch::stable::Tensor large, std::optional<torch::stable::Tensor> large_second,
                                      std::optional<torch::stable::Tensor> large_constants, double large_slope,
                                      torch::stable::Tensor small, std::optional<torch::stable::Tensor> small_second,
                                      std::optional<torch::stable::Tensor> small_constants, double small_slope,
                                      bool channels_last, int64_t scheme);

// bn_act's split operations; the contract stands in fastgan/backends.py.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> bn_stats(torch::stable::Tensor y);
torch::stable::Tensor bn_act(torch::stable::Tensor y, torch::stable::Tensor mean, torch::stable::Tensor invstd,
                             torch::stable::Tensor weight, torch::stable::Tensor bias, double slope);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> bn_act_reduce(
    torch::stable::Tensor dz, torch::stable::Tensor y, torch::stable::Tensor mean, torch::stable::Tensor invstd,
    torch::stable::Tensor weight, torch::stable::Tensor bias, double slope);
torch::stable::Tensor bn_act_backward(torch::stable::Tensor dz, torch::stable::Tensor y, torch::stable::Tensor mean,
                                      torch::stable::Tensor invstd, torch::stable::Tensor weight, torch::stable::Tensor bias,
                                      double slope, std::optional<torch::stable::Tensor> grad_weight,
                                      std::optional<torch::stable::Tensor> grad_bias, int64_t count);

// Forward and backward of bn_act in one call each, of the schemas in fastgan/ops/bn_act.py; bn_act_train moves the running
// statistics as well.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> bn_act_train(
    torch::stable::Tensor y, std::optional<torch::stable::Tensor> weight, std::optional<torch::stable::Tensor> bias,
    std::optional<torch::stable::Tensor> running_mean, std::optional<torch::stable::Tensor> running_var, double momentum,
    double eps, double slope);
torch::stable::Tensor bn_act_eval(torch::stable::Tensor y, std::optional<torch::stable::Tensor> weight,
                                  std::optional<torch::stable::Tensor> bias, std::optional<torch::stable::Tensor> mean,
                                  std::optional<torch::stable::Tensor> var, double eps, double slope);
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> bn_act_grad(
    torch::stable::Tensor dz, torch::stable::Tensor y, std::optional<torch::stable::Tensor> weight,
    std::optional<torch::stable::Tensor> bias, std::optional<torch::stable::Tensor> mean,
    std::optional<torch::stable::Tensor> var, double eps, double slope, bool training, bool needs_input, bool needs_affine);

// From (mean, m2) over `count` values to the constants [mu, s, beta, invstd] of the next prologue, running statistics
// updated, for as many sets as momenta; and from a block's two sums to [A, B, C, mu] and, added over all sets, (weight
// gradient, bias gradient). count 0: frozen statistics.
torch::stable::Tensor block_constants(torch::stable::Tensor sums, int64_t count, std::optional<torch::stable::Tensor> weight,
                                      std::optional<torch::stable::Tensor> bias, double eps,
                                      std::optional<torch::stable::Tensor> running_mean,
                                      std::optional<torch::stable::Tensor> running_var, std::vector<double> momenta);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> block_gradient_constants(torch::stable::Tensor sums,
                                                                                 torch::stable::Tensor constants,
                                                                                 int64_t count);
torch::stable::Tensor block_apply(torch::stable::Tensor y, torch::stable::Tensor constants, double slope);
torch::stable::Tensor block_reduce(torch::stable::Tensor dz, torch::stable::Tensor y, torch::stable::Tensor constants,
                                   double slope);
torch::stable::Tensor block_backward(torch::stable::Tensor dz, torch::stable::Tensor y,
                                     std::optional<torch::stable::Tensor> constants,
                                     std::optional<torch::stable::Tensor> gradient_constants, double slope);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> gan_bce(
    std::optional<torch::stable::Tensor> real, std::optional<torch::stable::Tensor> fake, double real_target,
    double fake_target);

// The contract stands in fastgan/ops/adam_ema.py.
void adam_ema(std::vector<torch::stable::Tensor> params, std::vector<torch::stable::Tensor> grads,
              std::vector<torch::stable::Tensor> exp_avgs, std::vector<torch::stable::Tensor> exp_avg_sqs,
              std::vector<torch::stable::Tensor> ema_params, torch::stable::Tensor step, double lr, double beta1, double beta2,
              double eps, double weight_decay, bool decoupled, double ema_decay);

}  // namespace fastgan::cpu
