// Checks and makers of tensors that the CPU operators share. Messages name the operator, the argument, what was expected
// and got.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/storage.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // which repeats PyTorch's own message; older ones have none
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastgan::cpu {

using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

inline Shape shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline bool has_shape(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return std::equal(shape.begin(), shape.end(), t.sizes().begin(), t.sizes().end());
}

// Memory in the order N, H, W, C without gaps (dimensions of size 1 may have any stride).
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline void check(const char* op, const char* name, const Tensor& t, const Shape& shape, bool channels_last,
                  torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype of the other tensors");
  STD_TORCH_CHECK(has_shape(t, shape), op, ": ", name, " must have shape ", text(shape), ", got ", text(shape_of(t)));
  if (t.numel() == 0) return;
  STD_TORCH_CHECK(channels_last ? is_channels_last(t) : t.is_contiguous(), op, ": ", name, " must be ",
                  channels_last ? "channels-last" : "contiguous");
}

inline Storage storage_of(const char* op, const char* name, const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float64");
  }
}

// Of sums and constants beside `t`, and a call of f with a number of that type.
inline torch::headeronly::ScalarType stat_type(const Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
template <class F>
auto with_stat_type(const Tensor& t, const F& f) {
  return stat_type(t) == torch::headeronly::ScalarType::Double ? f(double()) : f(float());
}

// New tensors, from PyTorch's C function: a call of its dispatcher takes longer than the kernels do for few values.
inline int32_t code_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
                  "fastgan: no CPU kernel makes a tensor of this dtype; expected float32, bfloat16 or float64");
  return dtype == ScalarType::Double     ? aoti_torch_dtype_float64()
         : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                         : aoti_torch_dtype_float32();
}

inline Tensor make_strided(const Shape& shape, const Shape& strides, torch::headeronly::ScalarType dtype) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), code_of(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// The same in memory that is the caller's.
inline Tensor make_view(void* memory, const Shape& shape, const Shape& strides, torch::headeronly::ScalarType dtype) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(memory, static_cast<int64_t>(shape.size()), shape.data(),
                                                                  strides.data(), 0, code_of(dtype), aoti_torch_device_type_cpu(), 0,
                                                                  &made));
  return Tensor(made);
}

inline Tensor make_empty_like(const Tensor& t) {
  return make_strided(shape_of(t), {t.strides().begin(), t.strides().end()}, t.scalar_type());
}

inline Tensor make_empty(const Shape& shape, torch::headeronly::ScalarType dtype) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return make_strided(shape, strides, dtype);
}

inline Shape channels_last_strides(const Shape& shape) {
  int64_t C = shape[1], W = shape[3] * C;
  return {shape[2] * W, 1, W, C};
}

inline Tensor make_channels_last(const Shape& shape, torch::headeronly::ScalarType dtype) {
  return make_strided(shape, channels_last_strides(shape), dtype);
}

inline Tensor make_zeros(const Shape& shape, torch::headeronly::ScalarType dtype) {
  Tensor t = make_empty(shape, dtype);
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

}  // namespace fastgan::cpu
