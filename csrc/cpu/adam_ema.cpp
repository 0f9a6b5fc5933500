#include "cpu/adam_ema.h"

#include <cmath>

#include "cpu/operators.h"
#include "cpu/tensors.h"
#include "dense.h"

namespace fastgan::cpu {
namespace {

using torch::headeronly::ScalarType;

template <class T>
T* checked(const char* list, size_t i, const Tensor& t, const Tensor& param, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu(), "adam_ema: ", list, "[", i, "] must be a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == type, "adam_ema: ", list, "[", i, "] must have the dtype of params[0]");
  auto sizes = param.sizes(), strides = param.strides(), own = t.strides();
  bool same = has_shape(t, param.sizes());
  for (size_t d = 0; same && d < sizes.size(); d++) same = sizes[d] == 1 || own[d] == strides[d];
  STD_TORCH_CHECK(same, "adam_ema: ", list, "[", i, "] must have the shape and strides of params[", i, "], ",
                  text(shape_of(param)), ", got ", text(shape_of(t)));
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace

void adam_ema(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> ema_params, Tensor step, double lr, double beta1,
              double beta2, double eps, double weight_decay, bool decoupled, double ema_decay) {
  size_t count = params.size();
  bool lengths = grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                 (ema_params.empty() || ema_params.size() == count);
  STD_TORCH_CHECK(lengths, "adam_ema: the lists must be as long as params, ", count, ", got grads ", grads.size(),
                  ", exp_avgs ", exp_avgs.size(), ", exp_avg_sqs ", exp_avg_sqs.size(), ", ema_params ", ema_params.size());
  if (count == 0) return;
  STD_TORCH_CHECK(step.is_cpu() && step.scalar_type() == ScalarType::Float && step.numel() == 1,
                  "adam_ema: step must be one float32 number on the CPU");
  double t = *static_cast<const float*>(step.const_data_ptr());
  auto run = [&]<class T>(ScalarType type) {
    std::vector<AdamTensor<T>> tensors;
    for (size_t i = 0; i < count; i++) {
      const Tensor& param = params[i];
      STD_TORCH_CHECK(is_dense(param), "adam_ema: params[", i, "] must be dense: its elements fill memory without gaps");
      tensors.push_back({checked<T>("params", i, param, param, type), checked<T>("grads", i, grads[i], param, type),
                         checked<T>("exp_avgs", i, exp_avgs[i], param, type),
                         checked<T>("exp_avg_sqs", i, exp_avg_sqs[i], param, type),
                         ema_params.empty() ? nullptr : checked<T>("ema_params", i, ema_params[i], param, type), param.numel()});
    }
    AdamFactors<T> factors{T(decoupled ? 1 - lr * weight_decay : 1),
                           T(decoupled ? 0 : weight_decay),
                           T(1 - beta1),
                           T(beta2),
                           T(1 - beta2),
                           T(lr / (1 - std::pow(beta1, t))),
                           T(std::sqrt(1 - std::pow(beta2, t))),
                           T(eps),
                           T(1 - ema_decay)};
    FASTGAN_DISPATCH(run_adam_ema(tensors, factors));
  };
  switch (params[0].scalar_type()) {
    case ScalarType::Float: return run.template operator()<float>(ScalarType::Float);
    case ScalarType::Double: return run.template operator()<double>(ScalarType::Double);
    default: STD_TORCH_CHECK(false, "adam_ema: params must be float32 or float64");
  }
}

}  // namespace fastgan::cpu
