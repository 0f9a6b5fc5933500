// The tests' module: every launcher of csrc/cuda, on NumPy arrays.
#include "simt/bindings.h"

#include <pybind11/stl.h>

#include "simt/selftest.h"

namespace fastgan::simt_bindings {

Array::Array(py::array array) : array_(std::move(array)) {
  bool writable = array_.writeable();
  memory_ = simt::allocate(array_.nbytes(), reinterpret_cast<uintptr_t>(array_.data()) % 16, !writable);
  std::memcpy(memory_, array_.data(), array_.nbytes());
}

Array::~Array() {
  if (array_.writeable()) std::memcpy(array_.mutable_data(), memory_, array_.nbytes());
  simt::release(memory_);
}

}  // namespace fastgan::simt_bindings

namespace py = pybind11;

PYBIND11_MODULE(libfastgan_simt, m) {
  using namespace fastgan;
  m.doc() = "CUDA kernels on the host (csrc/simt/runtime.h).";
  m.def("set_seed", &simt::set_seed);
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
