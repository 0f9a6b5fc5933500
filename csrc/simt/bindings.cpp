// The tests' module: every launcher of csrc/cuda, on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <deque>

#include "cuda/adam_ema.h"
#include "cuda/bn_act.h"
#include "cuda/conv_bn_act.h"
#include "cuda/gan_bce.h"
#include "simt/runtime.h"
#include "simt/selftest.h"

namespace py = pybind11;

namespace fastgan::simt_bindings {
namespace {

// A NumPy array in device memory while it lives: a read-only one is input, a writable one is copied back, and counts as
// unwritten before unless it is updated in place. Its address modulo 16 is kept, so that slices test misaligned tensors.
// A huge array is device memory itself.
class Array {
 public:
  explicit Array(py::array array, bool in_place = false);
  ~Array();
  Array(const Array&) = delete;
  template <class T>
  T* get() const {
    return static_cast<T*>(memory_);
  }

 private:
  py::array array_;
  void* memory_;
};

Array::Array(py::array array, bool in_place) : array_(std::move(array)) {
  bool initialised = in_place || !array_.writeable();
  if (static_cast<size_t>(array_.nbytes()) >= simt::huge) {
    memory_ = const_cast<void*>(array_.data());
    simt::adopt(memory_, array_.nbytes(), initialised);
  } else {
    memory_ = simt::allocate(array_.nbytes(), reinterpret_cast<uintptr_t>(array_.data()) % 16, initialised);
    std::memcpy(memory_, array_.data(), array_.nbytes());
  }
}

Array::~Array() {
  if (memory_ == array_.data()) {
    simt::disown(memory_);
    return;
  }
  if (array_.writeable()) std::memcpy(array_.mutable_data(), memory_, array_.nbytes());
  simt::release(memory_);
}

using cuda::BnChannels;
using cuda::BnShape;
using cuda::Element;

// Workspace and sums live on the device only.
struct Floats {
  explicit Floats(int64_t count) : memory(static_cast<float*>(simt::allocate(count * sizeof(float), 0, false))) {}
  ~Floats() { simt::release(memory); }
  float* memory;
};

BnShape shape_of(const py::tuple& nchw, bool channels_last) {
  return {nchw[0].cast<int64_t>(), nchw[1].cast<int64_t>(), nchw[2].cast<int64_t>() * nchw[3].cast<int64_t>(), channels_last};
}

struct Channels {
  Array mean, invstd, weight, bias;
  explicit Channels(const py::tuple& t) : mean(t[0]), invstd(t[1]), weight(t[2]), bias(t[3]) {}
  operator BnChannels() const { return {mean.get<float>(), invstd.get<float>(), weight.get<float>(), bias.get<float>()}; }
};

void bn_stats(int element, py::tuple nchw, bool channels_last, py::array y, py::array mean, py::array m2) {
  BnShape shape = shape_of(nchw, channels_last);
  Array in(y), out_mean(mean), out_m2(m2);
  Floats workspace(cuda::bn_workspace(shape));
  cuda::bn_stats(Element(element), shape, in.get<void>(), out_mean.get<float>(), out_m2.get<float>(), workspace.memory, nullptr);
}

void bn_act(int element, py::tuple nchw, bool channels_last, py::array y, py::tuple channels, float slope, py::array z) {
  Array in(y), out(z);
  Channels c(channels);
  cuda::bn_act(Element(element), shape_of(nchw, channels_last), in.get<void>(), c, slope, out.get<void>(), nullptr);
}

void bn_act_reduce(int element, py::tuple nchw, bool channels_last, py::array dz, py::array y, py::tuple channels, float slope,
                   py::array grad_weight, py::array grad_bias) {
  BnShape shape = shape_of(nchw, channels_last);
  Array in_dz(dz), in_y(y), out_weight(grad_weight), out_bias(grad_bias);
  Channels c(channels);
  Floats workspace(cuda::bn_workspace(shape));
  cuda::bn_act_reduce(Element(element), shape, in_dz.get<void>(), in_y.get<void>(), c, slope, out_weight.get<float>(),
                      out_bias.get<float>(), workspace.memory, nullptr);
}

void bn_act_backward(int element, py::tuple nchw, bool channels_last, py::array dz, py::array y, py::tuple channels, float slope,
                     py::array grad_weight, py::array grad_bias, int64_t count, py::array dy) {
  Array in_dz(dz), in_y(y), in_weight(grad_weight), in_bias(grad_bias), out(dy);
  Channels c(channels);
  cuda::bn_act_backward(Element(element), shape_of(nchw, channels_last), in_dz.get<void>(), in_y.get<void>(), c, slope,
                        in_weight.get<float>(), in_bias.get<float>(), count, out.get<void>(), nullptr);
}

void gan_bce(int element, py::array real, py::array fake, double real_target, double fake_target, py::array stats,
             py::array grad_real, py::array grad_fake) {
  Array in_real(real), in_fake(fake), out_stats(stats), out_real(grad_real), out_fake(grad_fake);
  cuda::gan_bce(Element(element), {in_real.get<void>(), real.size(), real_target, out_real.get<float>()},
                {in_fake.get<void>(), fake.size(), fake_target, out_fake.get<float>()}, out_stats.get<float>(), nullptr);
}

// Lists of fp32 arrays, updated in place; ema may be empty.
void adam_ema(std::vector<py::array> params, std::vector<py::array> grads, std::vector<py::array> exp_avgs,
              std::vector<py::array> exp_avg_sqs, std::vector<py::array> ema, py::array step, double lr, double beta1,
              double beta2, double eps, double weight_decay, bool decoupled, double ema_decay) {
  std::deque<Array> arrays;
  auto put = [&](py::array a) { return arrays.emplace_back(a, true).get<float>(); };
  std::vector<cuda::AdamTensor> tensors;
  for (size_t i = 0; i < params.size(); i++)
    tensors.push_back({put(params[i]), put(grads[i]), put(exp_avgs[i]), put(exp_avg_sqs[i]), ema.empty() ? nullptr : put(ema[i]),
                       params[i].size()});
  float* device_step = put(step);
  cuda::adam_ema(tensors.data(), static_cast<int>(tensors.size()), device_step,
                 {lr, beta1, beta2, eps, weight_decay, decoupled, ema_decay}, nullptr);
}

// geometry: (stride, padding, dilation), or (stride, padding, output_padding) when transposed; one for both axes.
// prologue: (mean, scale, bias), or empty for none. y has the shape of the result, channels-last.
void conv(int element, bool transposed, py::array x, py::array weight, py::tuple prologue, float slope, py::tuple geometry,
          py::array y, py::array mean, py::array m2) {
  int stride = geometry[0].cast<int>(), padding = geometry[1].cast<int>(), third = geometry[2].cast<int>();
  int n = x.shape(0), channels = x.shape(3), out_channels = weight.shape(0);
  auto axis = [&](int d, int phase) {
    int input = x.shape(d), weights = weight.shape(d);
    return transposed ? cuda::transposed_axis(input, weights, stride, padding, third, phase)
                      : cuda::conv_axis(input, weights, stride, padding, third);
  };
  std::vector<cuda::ConvShape> phases;
  for (int h = 0; h < (transposed ? stride : 1); h++)
    for (int w = 0; w < (transposed ? stride : 1); w++) phases.push_back({n, channels, out_channels, axis(1, h), axis(2, w)});
  Array in_x(x), in_weight(weight), out_y(y), out_mean(mean), out_m2(m2);
  std::deque<Array> given;
  for (py::handle p : prologue) given.emplace_back(p.cast<py::array>());
  cuda::ConvPrologue constants{nullptr, nullptr, nullptr, slope};
  if (!given.empty()) constants = {given[0].get<float>(), given[1].get<float>(), given[2].get<float>(), slope};
  int parts = 0, done = 0;
  for (const auto& phase : phases) parts += cuda::conv_parts(phase);
  Floats partials(int64_t{parts} * out_channels * 4);
  for (const auto& phase : phases) {
    cuda::conv_forward(Element(element), phase, in_x.get<void>(), in_weight.get<void>(), constants, out_y.get<void>(),
                       partials.memory + int64_t{done} * out_channels * 4, nullptr);
    done += cuda::conv_parts(phase);
  }
  cuda::conv_statistics(partials.memory, parts, out_channels, out_mean.get<float>(), out_m2.get<float>(), nullptr);
}

void bind_kernels(py::module_& m) {
  m.def("conv", &conv);
  m.def("bn_stats", &bn_stats);
  m.def("bn_act", &bn_act);
  m.def("bn_act_reduce", &bn_act_reduce);
  m.def("bn_act_backward", &bn_act_backward);
  m.def("gan_bce", &gan_bce);
  m.def("adam_ema", &adam_ema);
}

}  // namespace
}  // namespace fastgan::simt_bindings

PYBIND11_MODULE(libfastgan_simt, m) {
  using namespace fastgan;
  simt_bindings::bind_kernels(m);
  m.doc() = "CUDA kernels on the host (csrc/simt/runtime.h).";
  m.def("set_seed", &simt::set_seed);
  m.def("set_last_blocks_only", &simt::set_last_blocks_only);
  m.def("set_last_turns_only", &simt::set_last_turns_only);
  m.def("take_reports", [] {
    py::list all;
    for (const auto& r : simt::take_reports()) {
      py::dict d;
      d["kind"] = r.kind;
      d["message"] = r.message;
      d["kernel"] = r.kernel;
      d["where"] = r.where;
      d["block"] = py::make_tuple(r.block.x, r.block.y, r.block.z);
      d["thread"] = py::make_tuple(r.thread.x, r.thread.y, r.thread.z);
      d["count"] = r.count;
      all.append(d);
    }
    return all;
  });
  m.def("selftest_kernels", [] {
    std::vector<std::string> names;
    for (const auto& [name, launcher] : simt_selftest::kernels()) names.push_back(name);
    return names;
  });
  m.def("selftest", [](const std::string& name, bool broken) {
    void* y = simt::allocate(128 * sizeof(int), 0, name != "unwritten_global");
    std::memset(y, 0, 128 * sizeof(int));
    simt_selftest::kernels().at(name)(static_cast<int*>(y), broken);
    py::array_t<int> result(128, static_cast<int*>(y));
    simt::release(y);
    return result;
  });
}
