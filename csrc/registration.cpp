// Every operator of both libraries, once: its schema and its kernel. Compiled into each with FASTGAN_LIBRARY_CPU or
// FASTGAN_LIBRARY_CUDA. The public schemas, fakes and autograd formulas are Python's (fastgan/ops).
#include <torch/csrc/stable/library.h>

#ifdef FASTGAN_LIBRARY_CPU
#include "cpu/operators.h"

STABLE_TORCH_LIBRARY(fastgan_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("convolve(Tensor input, Tensor? second, Tensor? constants, float slope, Tensor weight, bool to_large, "
        "int height, int width, int statistics, Tensor? output_y, Tensor? output_constants, float output_slope, "
        "int scheme, bool passing=False) -> (Tensor, Tensor)");
  m.def("weight_gradient(Tensor large, Tensor? large_second, Tensor? large_constants, float large_slope, Tensor small, "
        "Tensor? small_second, Tensor? small_constants, float small_slope, bool channels_last, int scheme) -> Tensor");
  m.def("gan_bce(Tensor? real, Tensor? fake, float real_target, float fake_target) -> (Tensor, Tensor, Tensor)");
  m.def("bn_stats(Tensor y) -> (Tensor, Tensor)");
  m.def("bn_act(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope) -> Tensor");
  m.def("bn_act_reduce(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope) "
        "-> (Tensor, Tensor)");
  m.def("bn_act_backward(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope, "
        "Tensor? grad_weight, Tensor? grad_bias, int count) -> Tensor");
  m.def("bn_act_train(Tensor y, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "float momentum, float eps, float slope) -> (Tensor, Tensor, Tensor)");
  m.def("bn_act_eval(Tensor y, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, float slope) -> Tensor");
  m.def("bn_act_grad(Tensor dz, Tensor y, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, float slope, "
        "bool training, bool needs_input, bool needs_affine) -> (Tensor, Tensor, Tensor)");
  m.def("block_constants(Tensor sums, int count, Tensor? weight, Tensor? bias, float eps, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, float[] momenta) -> Tensor");
  m.def("block_apply(Tensor y, Tensor constants, float slope) -> Tensor");
  m.def("block_reduce(Tensor dz, Tensor y, Tensor constants, float slope) -> Tensor");
  m.def("block_backward(Tensor dz, Tensor y, Tensor? constants, Tensor? gradient_constants, float slope) -> Tensor");
  m.def("block_gradient_constants(Tensor sums, Tensor constants, int count) -> (Tensor, Tensor)");
  m.def(
      "adam_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] ema_params, Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool decoupled, float ema_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fastgan::cpu::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_cpu, CPU, m) {
  m.impl("convolve", TORCH_BOX(&fastgan::cpu::convolve));
  m.impl("weight_gradient", TORCH_BOX(&fastgan::cpu::weight_gradient));
  m.impl("block_constants", TORCH_BOX(&fastgan::cpu::block_constants));
  m.impl("block_gradient_constants", TORCH_BOX(&fastgan::cpu::block_gradient_constants));
  m.impl("block_apply", TORCH_BOX(&fastgan::cpu::block_apply));
  m.impl("block_reduce", TORCH_BOX(&fastgan::cpu::block_reduce));
  m.impl("block_backward", TORCH_BOX(&fastgan::cpu::block_backward));
  m.impl("gan_bce", TORCH_BOX(&fastgan::cpu::gan_bce));
  m.impl("bn_stats", TORCH_BOX(&fastgan::cpu::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fastgan::cpu::bn_act));
  m.impl("bn_act_reduce", TORCH_BOX(&fastgan::cpu::bn_act_reduce));
  m.impl("bn_act_backward", TORCH_BOX(&fastgan::cpu::bn_act_backward));
  m.impl("bn_act_train", TORCH_BOX(&fastgan::cpu::bn_act_train));
  m.impl("bn_act_eval", TORCH_BOX(&fastgan::cpu::bn_act_eval));
  m.impl("bn_act_grad", TORCH_BOX(&fastgan::cpu::bn_act_grad));
  m.impl("adam_ema", TORCH_BOX(&fastgan::cpu::adam_ema));
}
#endif

#ifdef FASTGAN_LIBRARY_CUDA
#include "cuda/operators.h"

STABLE_TORCH_LIBRARY(fastgan_cuda, m) {
  m.def("bn_stats(Tensor y) -> (Tensor, Tensor)");
  m.def("bn_act(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope) -> Tensor");
  m.def(
      "bn_act_reduce(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope) "
      "-> (Tensor, Tensor)");
  m.def(
      "bn_act_backward(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float slope, "
      "Tensor? grad_weight, Tensor? grad_bias, int count) -> Tensor");
  m.def("gan_bce(Tensor? real, Tensor? fake, float real_target, float fake_target) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_stats(Tensor x, Tensor weight, Tensor? mean, Tensor? scale, Tensor? bias, float slope, int stride, int padding, "
      "int dilation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_transpose_stats(Tensor x, Tensor weight, Tensor? mean, Tensor? scale, Tensor? bias, float slope, int stride, "
      "int padding, int output_padding) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adam_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] ema_params, Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool decoupled, float ema_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_cuda, CUDA, m) {
  m.impl("bn_stats", TORCH_BOX(&fastgan::cuda::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fastgan::cuda::bn_act));
  m.impl("bn_act_reduce", TORCH_BOX(&fastgan::cuda::bn_act_reduce));
  m.impl("bn_act_backward", TORCH_BOX(&fastgan::cuda::bn_act_backward));
  m.impl("gan_bce", TORCH_BOX(&fastgan::cuda::gan_bce));
  m.impl("conv_stats", TORCH_BOX(&fastgan::cuda::conv_stats));
  m.impl("conv_transpose_stats", TORCH_BOX(&fastgan::cuda::conv_transpose_stats));
  m.impl("adam_ema", TORCH_BOX(&fastgan::cuda::adam_ema));
}
#endif
