// Checks and views that the CPU operators share. Messages name the operator, the argument, what was expected and got.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace fastgan::cpu {

using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

inline Shape shape_of(const Tensor& t) {
  Shape s;
  for (int64_t i = 0; i < t.dim(); i++) s.push_back(t.size(i));
  return s;
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
  STD_TORCH_CHECK(shape_of(t) == shape, op, ": ", name, " must have shape ", text(shape), ", got ", text(shape_of(t)));
  if (t.numel() == 0) return;
  STD_TORCH_CHECK(channels_last ? is_channels_last(t) : t.is_contiguous(), op, ": ", name, " must be ",
                  channels_last ? "channels-last" : "contiguous");
}

inline Tensor empty_channels_last(const Tensor& like, const Shape& shape) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace fastgan::cpu
