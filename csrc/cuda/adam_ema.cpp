#include "cuda/adam_ema.h"

#include "cuda/checks.h"
#include "cuda/operators.h"
#include "dense.h"

namespace fastgan::cuda {
namespace {

float* check_tensor(const char* list, size_t i, const Tensor& t, const Tensor& param) {
  std::string name = std::string(list) + "[" + std::to_string(i) + "]";
  check_cuda("adam_ema", name.c_str(), t, param);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "adam_ema: ", name, " must be float32");
  bool same = t.dim() == param.dim();
  for (int64_t d = 0; same && d < t.dim(); d++) same = t.size(d) == param.size(d) && (t.size(d) == 1 || t.stride(d) == param.stride(d));
  STD_TORCH_CHECK(same, "adam_ema: ", name, " must have the shape and strides of params[", i, "], ", shape_of(param), ", got ",
                  shape_of(t));
  STD_TORCH_CHECK(is_dense(t), "adam_ema: ", name, " must be dense: its elements fill memory without gaps");
  return static_cast<float*>(t.mutable_data_ptr());
}

}  // namespace

void adam_ema(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> ema_params, const Tensor& step, double lr, double beta1,
              double beta2, double eps, double weight_decay, bool decoupled, double ema_decay) {
  size_t count = params.size();
  bool lengths = grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                 (ema_params.empty() || ema_params.size() == count);
  STD_TORCH_CHECK(lengths, "adam_ema: the lists must be as long as params, ", count, ", got grads ", grads.size(),
                  ", exp_avgs ", exp_avgs.size(), ", exp_avg_sqs ", exp_avg_sqs.size(), ", ema_params ", ema_params.size());
  if (count == 0) return;
  check_cuda("adam_ema", "step", step, params[0]);
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float && step.numel() == 1, "adam_ema: step must be one float32 number");
  std::vector<AdamTensor> tensors(count);
  for (size_t i = 0; i < count; i++) {
    const Tensor& param = params[i];
    check_cuda("adam_ema", "params", param, params[0]);
    tensors[i] = {check_tensor("params", i, param, param),
                  check_tensor("grads", i, grads[i], param),
                  check_tensor("exp_avgs", i, exp_avgs[i], param),
                  check_tensor("exp_avg_sqs", i, exp_avg_sqs[i], param),
                  ema_params.empty() ? nullptr : check_tensor("ema_params", i, ema_params[i], param),
                  param.numel()};
  }
  torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  AdamOptions options{lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay};
  check_launch(adam_ema(tensors.data(), static_cast<int>(count), step.const_data_ptr<float>(), options, current_stream(step)));
}

}  // namespace fastgan::cuda
