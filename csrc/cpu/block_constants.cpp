// The O(C) work between two convolutions: from a convolution's sums to the constants of the next prologue, for each set of
// them: a batch of several has one for each part.
#include <cmath>

#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace fastgan::cpu {
namespace {

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// Calls f with the values of `sums` in their own type.
template <class F>
void with_values(const char* op, const Tensor& sums, const F& f) {
  STD_TORCH_CHECK(stat_type(sums) == sums.scalar_type(), op, ": sums must be float32 or float64");
  with_stat_type(sums, [&]<class T>(T) { f(static_cast<const T*>(sums.const_data_ptr())); });
}

template <class T>
void forward(int64_t C, const T* sums, int64_t count, const T* weight, const T* bias, double eps, T* running_mean, T* running_var,
             double momentum, T* out) {
  for (int64_t c = 0; c < C; c++) {
    double mean = sums[c], m2 = sums[C + c], invstd = 1 / std::sqrt(m2 / static_cast<double>(count) + eps);
    out[c] = sums[c], out[C + c] = static_cast<T>((weight ? weight[c] : 1) * invstd), out[2 * C + c] = bias ? bias[c] : T(0);
    out[3 * C + c] = static_cast<T>(invstd);
    if (running_mean == nullptr) continue;
    running_mean[c] = static_cast<T>((1 - momentum) * running_mean[c] + momentum * mean);
    running_var[c] = static_cast<T>((1 - momentum) * running_var[c] + momentum * m2 / static_cast<double>(count - 1));
  }
}

template <class T>
void backward(int64_t C, const T* sums, const T* constants, int64_t count, T* out, T* grads) {
  for (int64_t c = 0; c < C; c++) {
    T scale = constants[C + c], invstd = constants[3 * C + c], grad_bias = sums[c], grad_weight = invstd * sums[C + c];
    grads[c] += grad_weight, grads[C + c] += grad_bias;  // over all sets
    out[c] = scale, out[3 * C + c] = constants[c];
    out[C + c] = count ? -scale * invstd * grad_weight / static_cast<T>(count) : T(0);
    out[2 * C + c] = count ? -scale * grad_bias / static_cast<T>(count) : T(0);
  }
}

}  // namespace

Tensor block_constants(Tensor sums, int64_t count, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                       std::optional<Tensor> running_mean, std::optional<Tensor> running_var, std::vector<double> momenta) {
  const char* op = "block_constants";
  int64_t C = sums.size(1), sets = momenta.size();
  check(op, "sums", sums, {2 * sets, C}, false, sums.scalar_type());
  const std::optional<Tensor>* given[] = {&weight, &bias, &running_mean, &running_var};
  const char* names[] = {"weight", "bias", "running_mean", "running_var"};
  for (int i = 0; i < 4; i++) {
    if (*given[i]) check(op, names[i], **given[i], {C}, false, sums.scalar_type());
  }
  STD_TORCH_CHECK(!running_mean == !running_var, op, ": running_mean and running_var come together");
  STD_TORCH_CHECK(count > 1 || !running_mean, op, ": the running variance needs more than 1 value per channel");
  Tensor out = make_empty({4 * sets, C}, sums.scalar_type());
  with_values(op, sums, [&]<class T>(const T* in) {
    T* rows = static_cast<T*>(out.mutable_data_ptr());
    for (double momentum : momenta) {
      forward(C, in, count, data<T>(weight), data<T>(bias), eps, data<T>(running_mean), data<T>(running_var), momentum, rows);
      in += 2 * C, rows += 4 * C;
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> block_gradient_constants(Tensor sums, Tensor constants, int64_t count) {
  const char* op = "block_gradient_constants";
  int64_t C = sums.size(1), sets = sums.size(0) / 2;
  check(op, "sums", sums, {2 * sets, C}, false, sums.scalar_type());
  check(op, "constants", constants, {4 * sets, C}, false, sums.scalar_type());
  Tensor out = make_empty({4 * sets, C}, sums.scalar_type()), grads = make_zeros({2, C}, sums.scalar_type());
  with_values(op, sums, [&]<class T>(const T* in) {
    T* rows = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t set = 0; set < sets; set++, in += 2 * C, rows += 4 * C) {
      backward(C, in, static_cast<const T*>(constants.const_data_ptr()) + set * 4 * C, count, rows,
               static_cast<T*>(grads.mutable_data_ptr()));
    }
  });
  return {out, grads};
}

}  // namespace fastgan::cpu
