#include "cpu/bn_act.h"

#include <algorithm>
#include <cmath>

#include "cpu/operators.h"
#include "cpu/per_channel.h"
#include "cpu/tensors.h"

namespace fastgan::cpu {
namespace {

// y is [N, C] or [N, C, ...], dense: contiguous or channels-last.
BnAct problem(const char* op, BnActStep step, const Tensor& y) {
  STD_TORCH_CHECK(y.is_cpu() && y.dim() >= 2 && y.numel() > 0, op, ": y must be a CPU tensor [N, C, ...] that is not empty");
  BnAct p{step, storage_of(op, "y", y)};
  p.N = y.size(0), p.C = y.size(1), p.S = y.numel() / (p.N * p.C);
  p.channels_last = is_channels_last(y) || (y.dim() == 2 && y.is_contiguous());
  STD_TORCH_CHECK(p.channels_last || y.is_contiguous(), op, ": y must be contiguous or channels-last");
  if (p.C == 1) p.S *= p.N, p.N = 1, p.channels_last = false;  // one long row, in either layout
  p.y = y.const_data_ptr();
  return p;
}

void add_gradient(const char* op, BnAct& p, const Tensor& dz, const Tensor& y) {
  STD_TORCH_CHECK(has_shape(dz, y.sizes()) && dz.scalar_type() == y.scalar_type(), op, ": dz must have y's shape and dtype");
  STD_TORCH_CHECK(p.channels_last ? is_channels_last(dz) || (y.dim() == 2 && dz.is_contiguous()) : dz.is_contiguous(), op,
                  ": dz must have y's memory format");
  p.dz = dz.const_data_ptr();
}

struct Constants {
  PerChannel mean, invstd, weight, bias, grad_weight{0.0}, grad_bias{0.0};
  int64_t count = 0;  // > 0 makes the three rows of backward, too
};

// Runs a step with the rows that it reads.
void run_with(BnAct& p, const Tensor& y, const Constants& by) {
  with_stat_type(y, [&]<class T>(T) {
    std::vector<T> rows(6 * p.C);
    T* out = rows.data();
    for (int64_t c = 0; c < p.C; c++, out++) {
      T invstd = static_cast<T>(by.invstd[c]), scale = static_cast<T>(by.weight[c]) * invstd, n = static_cast<T>(by.count);
      out[0] = static_cast<T>(by.mean[c]), out[p.C] = scale, out[2 * p.C] = static_cast<T>(by.bias[c]), out[3 * p.C] = scale;
      if (by.count == 0) continue;
      out[4 * p.C] = -scale * invstd * static_cast<T>(by.grad_weight[c]) / n;
      out[5 * p.C] = -scale * static_cast<T>(by.grad_bias[c]) / n;
    }
    p.constants = rows.data();
    FASTGAN_DISPATCH_WIDE(run_bn_act(p));
  });
}

std::tuple<Tensor, Tensor> rows_of(const Tensor& pair) {
  return {torch::stable::select(pair, 0, 0), torch::stable::select(pair, 0, 1)};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(Tensor y) {
  BnAct p = problem("bn_stats", BnActStep::statistics, y);
  Tensor out = make_empty({2, p.C}, stat_type(y));
  p.out = out.mutable_data_ptr();
  FASTGAN_DISPATCH_WIDE(run_bn_act(p));
  return rows_of(out);
}

Tensor bn_act(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, double slope) {
  const char* op = "bn_act";
  BnAct p = problem(op, BnActStep::apply, y);
  Tensor z = make_empty_like(y);
  p.slope = slope, p.out = z.mutable_data_ptr();
  run_with(p, y, {{op, "mean", mean, y}, {op, "invstd", invstd, y}, {op, "weight", weight, y}, {op, "bias", bias, y}});
  return z;
}

std::tuple<Tensor, Tensor> bn_act_reduce(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias,
                                         double slope) {
  const char* op = "bn_act_reduce";
  BnAct p = problem(op, BnActStep::reduce, y);
  add_gradient(op, p, dz, y);
  Tensor out = make_empty({2, p.C}, stat_type(y));
  p.slope = slope, p.out = out.mutable_data_ptr();
  PerChannel inverse(op, "invstd", invstd, y);
  run_with(p, y, {{op, "mean", mean, y}, inverse, {op, "weight", weight, y}, {op, "bias", bias, y}});
  with_stat_type(y, [&]<class T>(T) {
    for (int64_t c = 0; c < p.C; c++) static_cast<T*>(p.out)[p.C + c] *= static_cast<T>(inverse[c]);
  });
  auto [grad_bias, grad_weight] = rows_of(out);
  return {grad_weight, grad_bias};
}

Tensor bn_act_backward(Tensor dz, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, double slope,
                       std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias, int64_t count) {
  const char* op = "bn_act_backward";
  BnAct p = problem(op, BnActStep::backward, y);
  add_gradient(op, p, dz, y);
  STD_TORCH_CHECK(count == 0 || (grad_weight && grad_bias), op, ": count > 0 needs grad_weight and grad_bias");
  Tensor dy = make_empty_like(y);
  p.slope = slope, p.out = dy.mutable_data_ptr();
  run_with(p, y, {{op, "mean", mean, y}, {op, "invstd", invstd, y}, {op, "weight", weight, y}, {op, "bias", bias, y},
                  {op, "grad_weight", grad_weight, y}, {op, "grad_bias", grad_bias, y}, count});
  return dy;
}

// Forward and backward in one call each: on small tensors calls cost more than passes. Both make their constants of the
// same stored mean and variance, so that they agree on the sign of every activation.
namespace {

// 1/std of each channel; 1 where there is no variance.
template <class T>
std::vector<double> inverse_deviations(const PerChannel& var, int64_t C, double eps) {
  std::vector<double> out(C, 1.0);
  for (int64_t c = 0; var && c < C; c++) out[c] = static_cast<T>(1 / std::sqrt(var[c] + eps));
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_act_train(Tensor y, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                                double momentum, double eps, double slope) {
  const char* op = "bn_act_train";
  BnAct p = problem(op, BnActStep::statistics, y);
  PerChannel gamma(op, "weight", weight, y, 1), beta(op, "bias", bias, y), moving_mean(op, "running_mean", running_mean, y),
      moving_var(op, "running_var", running_var, y);
  STD_TORCH_CHECK(bool(moving_mean) == bool(moving_var), op, ": running_mean and running_var come together");
  double count = static_cast<double>(y.numel() / p.C);
  STD_TORCH_CHECK(count > 1, op, ": expected more than 1 value per channel");
  Tensor mean = make_empty({p.C}, stat_type(y)), var = make_empty_like(mean);
  Tensor z = make_empty_like(y);
  with_stat_type(y, [&]<class T>(T) {
    std::vector<T> sums(2 * p.C);
    p.out = sums.data();
    FASTGAN_DISPATCH_WIDE(run_bn_act(p));
    for (int64_t c = 0; c < p.C; c++) {
      static_cast<T*>(mean.mutable_data_ptr())[c] = sums[c];
      static_cast<T*>(var.mutable_data_ptr())[c] = static_cast<T>(sums[p.C + c] / count);
      if (!moving_mean) continue;
      moving_mean.set(c, (1 - momentum) * moving_mean[c] + momentum * sums[c]);
      moving_var.set(c, (1 - momentum) * moving_var[c] + momentum * sums[p.C + c] / (count - 1));
    }
    std::vector<double> invstd = inverse_deviations<T>(PerChannel(op, "var", var, y), p.C, eps);
    p.step = BnActStep::apply, p.slope = slope, p.out = z.mutable_data_ptr();
    run_with(p, y, {{op, "mean", mean, y}, PerChannel(invstd), gamma, beta});
  });
  return {z, mean, var};
}

Tensor bn_act_eval(Tensor y, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> mean,
                   std::optional<Tensor> var, double eps, double slope) {
  const char* op = "bn_act_eval";
  BnAct p = problem(op, BnActStep::apply, y);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), op, ": mean and var come together");
  Tensor z = make_empty_like(y);
  p.slope = slope, p.out = z.mutable_data_ptr();
  std::vector<double> invstd = with_stat_type(
      y, [&]<class T>(T) { return inverse_deviations<T>(PerChannel(op, "var", var, y), p.C, eps); });
  run_with(p, y, {{op, "mean", mean, y}, PerChannel(invstd), {op, "weight", weight, y, 1}, {op, "bias", bias, y}});
  return z;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_grad(Tensor dz, Tensor y, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                               std::optional<Tensor> mean, std::optional<Tensor> var, double eps, double slope,
                                               bool training, bool needs_input, bool needs_affine) {
  const char* op = "bn_act_grad";
  BnAct p = problem(op, BnActStep::reduce, y);
  add_gradient(op, p, dz, y);
  Tensor dy = needs_input ? make_empty_like(y) : make_empty({0}, y.scalar_type());
  auto gradient_of = [&](const std::optional<Tensor>& t) {
    return t && needs_affine ? make_empty({p.C}, t->scalar_type()) : make_empty({0}, y.scalar_type());
  };
  Tensor grad_weight = gradient_of(weight), grad_bias = gradient_of(bias);
  with_stat_type(y, [&]<class T>(T) {
    std::vector<double> invstd = inverse_deviations<T>(PerChannel(op, "var", var, y), p.C, eps), first(p.C), second(p.C);
    Constants by{{op, "mean", mean, y}, PerChannel(invstd), {op, "weight", weight, y, 1}, {op, "bias", bias, y},
                 PerChannel(first), PerChannel(second), training ? y.numel() / p.C : 0};
    p.slope = slope;
    if (training || needs_affine) {
      std::vector<T> sums(2 * p.C);
      p.out = sums.data();
      run_with(p, y, by);
      for (int64_t c = 0; c < p.C; c++) first[c] = static_cast<T>(invstd[c] * sums[p.C + c]), second[c] = sums[c];
    }
    for (auto [gradient, parameter, values] : {std::tuple(grad_weight, weight, by.grad_weight), std::tuple(grad_bias, bias, by.grad_bias)}) {
      PerChannel out(op, "gradient", parameter && needs_affine ? std::optional(gradient) : std::nullopt, y);
      for (int64_t c = 0; out && c < p.C; c++) out.set(c, values[c]);
    }
    if (!needs_input) return;
    p.step = BnActStep::backward, p.out = dy.mutable_data_ptr();
    run_with(p, y, by);
  });
  return {dy, grad_weight, grad_bias};
}

// The same passes for a block that has its constants already (block_constants.cpp).

Tensor block_apply(Tensor y, Tensor constants, double slope) {
  BnAct p = problem("block_apply", BnActStep::apply, y);
  check("block_apply", "constants", constants, {4, p.C}, false, stat_type(y));
  Tensor z = make_empty_like(y);
  p.constants = constants.const_data_ptr(), p.slope = slope, p.out = z.mutable_data_ptr();
  FASTGAN_DISPATCH_WIDE(run_bn_act(p));
  return z;
}

Tensor block_reduce(Tensor dz, Tensor y, Tensor constants, double slope) {
  BnAct p = problem("block_reduce", BnActStep::reduce, y);
  add_gradient("block_reduce", p, dz, y);
  check("block_reduce", "constants", constants, {4, p.C}, false, stat_type(y));
  Tensor out = make_empty({2, p.C}, stat_type(y));
  p.constants = constants.const_data_ptr(), p.slope = slope, p.out = out.mutable_data_ptr();
  FASTGAN_DISPATCH_WIDE(run_bn_act(p));
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
  Tensor dy = make_empty_like(y);
  p.slope = constants ? slope : 1, p.out = dy.mutable_data_ptr();
  with_stat_type(y, [&]<class T>(T) {
    std::vector<T> rows(6 * p.C);
    T* out = rows.data();
    if (constants) std::copy_n(static_cast<const T*>(constants->const_data_ptr()), 3 * p.C, out);
    if (gradient_constants) {
      auto by = static_cast<const T*>(gradient_constants->const_data_ptr());
      std::copy_n(by, 3 * p.C, out + 3 * p.C);
      std::copy_n(by + 3 * p.C, p.C, out);
    } else {
      std::fill_n(out + 3 * p.C, p.C, T(1));
    }
    p.constants = out;
    FASTGAN_DISPATCH_WIDE(run_bn_act(p));
  });
  return dy;
}

}  // namespace fastgan::cpu
