// A number for each channel, as the O(C) work of bn_act reads it: a [C] tensor of any stride, in the statistics' type or
// the activation's, a vector, or the same number for all.
#pragma once
#include <torch/headeronly/util/BFloat16.h>

#include <optional>
#include <vector>

#include "cpu/tensors.h"

namespace fastgan::cpu {

class PerChannel {
  using Type = torch::headeronly::ScalarType;
  void* data_ = nullptr;
  Type type_ = Type::Double;
  int64_t stride_ = 1;
  double same_ = 0;

 public:
  explicit PerChannel(double same) : same_(same) {}
  explicit PerChannel(std::vector<double>& values) : data_(values.data()) {}

  // What `t` holds, or `absent` for every channel; y is the activation [N, C, ...].
  PerChannel(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& y, double absent = 0)
      : same_(absent) {
    if (!t) return;
    STD_TORCH_CHECK(t->is_cpu(), op, ": ", name, " must be a CPU tensor");
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == y.size(1), op, ": ", name, " must have shape ", text({y.size(1)}), ", got ",
                    text(shape_of(*t)));
    type_ = t->scalar_type(), stride_ = t->stride(0), data_ = t->mutable_data_ptr();
    bool half = y.scalar_type() == Type::BFloat16;
    STD_TORCH_CHECK(type_ == y.scalar_type() || (half && type_ == Type::Float), op, ": ", name, " must have y's dtype",
                    half ? " or float32" : "");
  }

  explicit operator bool() const { return data_ != nullptr; }

  double operator[](int64_t c) const {
    if (data_ == nullptr) return same_;
    if (type_ == Type::Float) return static_cast<const float*>(data_)[c * stride_];
    if (type_ == Type::Double) return static_cast<const double*>(data_)[c * stride_];
    return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data_)[c * stride_]);
  }

  void set(int64_t c, double value) const {
    if (type_ == Type::Float) static_cast<float*>(data_)[c * stride_] = static_cast<float>(value);
    else if (type_ == Type::Double) static_cast<double*>(data_)[c * stride_] = value;
    else static_cast<torch::headeronly::BFloat16*>(data_)[c * stride_] = static_cast<float>(value);
  }
};

}  // namespace fastgan::cpu
