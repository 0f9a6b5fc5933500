// What the wrappers check before a launch, each with a message that names the argument, what was expected and what came.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "cuda/element.h"

namespace fastgan::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); d++) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline Element element_of(const char* operation, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    default: STD_TORCH_CHECK(false, operation, ": ", name, " must be float32, float16 or bfloat16");
  }
}

inline void check_cuda(const char* operation, const char* name, const Tensor& t, const Tensor& model) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == model.get_device_index(), operation, ": ", name,
                  " must be on the same CUDA device as the first tensor, ", model.get_device_index(), ", got ",
                  t.is_cuda() ? std::to_string(t.get_device_index()) : std::string("a tensor that is not on CUDA"));
}

// A dense fp32 vector, one number per channel.
inline const float* per_channel(const char* operation, const char* name, const Tensor& t, const Tensor& model, int64_t channels) {
  check_cuda(operation, name, t, model);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, operation, ": ", name, " must be float32");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), operation, ": ", name,
                  " must be contiguous of shape [C] = [", channels, "], got ", shape_of(t));
  return t.const_data_ptr<float>();
}

inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// Of what a launcher returns.
inline void check_launch(int error) { STD_CUDA_CHECK(static_cast<cudaError_t>(error)); }

}  // namespace fastgan::cuda
