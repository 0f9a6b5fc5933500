#include "cpu/bn_act.h"

#include <algorithm>

#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace fastgan::cpu {
namespace {

using torch::headeronly::ScalarType;

ScalarType stat_type(const Tensor& y) {
  return y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// y is [N, C] or [N, C, ...], dense: contiguous or channels-last.
BnAct problem(const char* op, BnActStep step, const Tensor& y) {
  STD_TORCH_CHECK(y.is_cpu() && y.dim() >= 2 && y.numel() > 0, op, ": y must be a CPU tensor [N, C, ...] that is not empty");
  BnAct p{step};
  switch (y.scalar_type()) {
    case ScalarType::Float: p.storage = Storage::float32; break;
    case ScalarType::Double: p.storage = Storage::float64; break;
    case ScalarType::BFloat16: p.storage = Storage::bfloat16; break;
    default: STD_TORCH_CHECK(false, op, ": y must be float32, bfloat16 or float64");
  }
  p.N = y.size(0), p.C = y.size(1), p.S = y.numel() / (p.N * p.C);
  p.channels_last = is_channels_last(y) || (y.dim() == 2 && y.is_contiguous());
  STD_TORCH_CHECK(p.channels_last || y.is_contiguous(), op, ": y must be contiguous or channels-last");
  p.y = y.const_data_ptr();
  return p;
}

void add_gradient(const char* op, BnAct& p, const Tensor& dz, const Tensor& y) {
  STD_TORCH_CHECK(shape_of(dz) == shape_of(y) && dz.scalar_type() == y.scalar_type(), op, ": dz must have y's shape and dtype");
  STD_TORCH_CHECK(p.channels_last ? is_channels_last(dz) || (y.dim() == 2 && dz.is_contiguous()) : dz.is_contiguous(), op,
                  ": dz must have y's memory format");
  p.dz = dz.const_data_ptr();
}

struct PerChannel {
  Tensor mean, invstd, weight, bias;
  double slope;
};

// The rows that run_bn_act reads, in the statistics' type; `sums` and count > 0 add the three of backward.
template <class T>
Tensor constants_of(const char* op, const Tensor& y, const PerChannel& c, const Tensor* grad_weight, const Tensor* grad_bias,
                    int64_t count) {
  int64_t C = y.size(1);
  const char* names[] = {"mean", "invstd", "weight", "bias", "grad_weight", "grad_bias"};
  const Tensor* tensors[] = {&c.mean, &c.invstd, &c.weight, &c.bias, grad_weight, grad_bias};
  const T* data[6] = {};
  for (int i = 0; i < 6; i++) {
    if (tensors[i] == nullptr) continue;
    check(op, names[i], *tensors[i], {C}, false, stat_type(y));
    data[i] = static_cast<const T*>(tensors[i]->const_data_ptr());
  }
  auto [mean, invstd, weight, bias, weight_sum, bias_sum] = data;
  Tensor rows = torch::stable::new_empty(c.mean, {6, C});
  T* out = static_cast<T*>(rows.mutable_data_ptr());
  for (int64_t i = 0; i < C; i++) {
    T scale = weight[i] * invstd[i];
    out[i] = mean[i], out[C + i] = scale, out[2 * C + i] = bias[i], out[3 * C + i] = scale;
    out[4 * C + i] = count ? -scale * invstd[i] * weight_sum[i] / static_cast<T>(count) : T(0);
    out[5 * C + i] = count ? -scale * bias_sum[i] / static_cast<T>(count) : T(0);
  }
  return rows;
}

Tensor constants(const char* op, const Tensor& y, const PerChannel& c, const Tensor* grad_weight = nullptr,
                 const Tensor* grad_bias = nullptr, int64_t count = 0) {
  return stat_type(y) == ScalarType::Double ? constants_of<double>(op, y, c, grad_weight, grad_bias, count)
                                            : constants_of<float>(op, y, c, grad_weight, grad_bias, count);
}

std::tuple<Tensor, Tensor> rows_of(const Tensor& pair) {
  return {torch::stable::select(pair, 0, 0), torch::stable::select(pair, 0, 1)};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(Tensor y) {
  BnAct p = problem("bn_stats", BnActStep::statistics, y);
  Tensor out = torch::stable::new_empty(y, {2, p.C}, stat_type(y));
  p.out = out.mutable_data_ptr();
  FASTGAN_PROVED(run_bn_act(p));
  return rows_of(out);
}

Tensor bn_act(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, double slope) {
  BnAct p = problem("bn_act", BnActStep::apply, y);
  Tensor rows = constants("bn_act", y, {mean, invstd, weight, bias, slope}), z = torch::stable::empty_like(y);
  p.constants = rows.const_data_ptr(), p.slope = slope, p.out = z.mutable_data_ptr();
  FASTGAN_PROVED(run_bn_act(p));
  return z;
}

std::tuple<Tensor, Tensor> bn_act_reduce(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias,
                                         double slope) {
  BnAct p = problem("bn_act_reduce", BnActStep::reduce, y);
  add_gradient("bn_act_reduce", p, dz, y);
  Tensor rows = constants("bn_act_reduce", y, {mean, invstd, weight, bias, slope});
  Tensor out = torch::stable::new_empty(mean, {2, p.C});
  p.constants = rows.const_data_ptr(), p.slope = slope, p.out = out.mutable_data_ptr();
  FASTGAN_PROVED(run_bn_act(p));
  auto [grad_bias, deviations] = rows_of(out);
  auto scale = [C = p.C](auto* sum, const auto* invstd) {
    for (int64_t i = 0; i < C; i++) sum[i] *= invstd[i];
  };
  if (stat_type(y) == ScalarType::Double) {
    scale(static_cast<double*>(deviations.mutable_data_ptr()), static_cast<const double*>(invstd.const_data_ptr()));
  } else {
    scale(static_cast<float*>(deviations.mutable_data_ptr()), static_cast<const float*>(invstd.const_data_ptr()));
  }
  return {deviations, grad_bias};
}

Tensor bn_act_backward(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, double slope,
                       std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias, int64_t count) {
  BnAct p = problem("bn_act_backward", BnActStep::backward, y);
  add_gradient("bn_act_backward", p, dz, y);
  STD_TORCH_CHECK(count == 0 || (grad_weight && grad_bias), "bn_act_backward: count > 0 needs grad_weight and grad_bias");
  Tensor rows = constants("bn_act_backward", y, {mean, invstd, weight, bias, slope}, grad_weight ? &*grad_weight : nullptr,
                          grad_bias ? &*grad_bias : nullptr, count);
  Tensor dy = torch::stable::empty_like(y);
  p.constants = rows.const_data_ptr(), p.slope = slope, p.out = dy.mutable_data_ptr();
  FASTGAN_PROVED(run_bn_act(p));
  return dy;
}

// The same passes for a block that has its constants already (block_constants.cpp).

Tensor block_apply(Tensor y, Tensor constants, double slope) {
  BnAct p = problem("block_apply", BnActStep::apply, y);
  check("block_apply", "constants", constants, {4, p.C}, false, stat_type(y));
  Tensor z = torch::stable::empty_like(y);
  p.constants = constants.const_data_ptr(), p.slope = slope, p.out = z.mutable_data_ptr();
  FASTGAN_PROVED(run_bn_act(p));
  return z;
}

Tensor block_reduce(Tensor dz, Tensor y, Tensor constants, double slope) {
  BnAct p = problem("block_reduce", BnActStep::reduce, y);
  add_gradient("block_reduce", p, dz, y);
  check("block_reduce", "constants", constants, {4, p.C}, false, stat_type(y));
  Tensor out = torch::stable::new_empty(constants, {2, p.C});
  p.constants = constants.const_data_ptr(), p.slope = slope, p.out = out.mutable_data_ptr();
  FASTGAN_PROVED(run_bn_act(p));
  return out;
}

// A*g + B*(y - mu) + C with g = dz*phi'(v); without gradient_constants g itself, without constants g = dz.
Tensor block_backward(Tensor dz, Tensor y, std::optional<Tensor> constants, std::optional<Tensor> gradient_constants,
                      double slope) {
  const char* op = "block_backward";
  BnAct p = problem(op, BnActStep::backward, y);
  add_gradient(op, p, dz, y);
  STD_TORCH_CHECK(constants || gradient_constants, op, ": expected constants, gradient_constants or both");
  if (constants) check(op, "constants", *constants, {4, p.C}, false, stat_type(y));
  if (gradient_constants) check(op, "gradient_constants", *gradient_constants, {4, p.C}, false, stat_type(y));
  Tensor rows = torch::stable::new_zeros(constants ? *constants : *gradient_constants, {6, p.C});
  auto fill = [&]<class T>(T* out) {
    if (constants) std::copy_n(static_cast<const T*>(constants->const_data_ptr()), 3 * p.C, out);
    if (!gradient_constants) return (void)std::fill_n(out + 3 * p.C, p.C, T(1));
    auto by = static_cast<const T*>(gradient_constants->const_data_ptr());
    std::copy_n(by, 3 * p.C, out + 3 * p.C);
    std::copy_n(by + 3 * p.C, p.C, out);
  };
  if (stat_type(y) == ScalarType::Double) {
    fill(static_cast<double*>(rows.mutable_data_ptr()));
  } else {
    fill(static_cast<float*>(rows.mutable_data_ptr()));
  }
  Tensor dy = torch::stable::empty_like(y);
  p.constants = rows.const_data_ptr(), p.slope = constants ? slope : 1, p.out = dy.mutable_data_ptr();
  FASTGAN_PROVED(run_bn_act(p));
  return dy;
}

}  // namespace fastgan::cpu
