#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>

#include "simt/runtime.h"

namespace fastgan::simt_bindings {

namespace py = pybind11;

// A NumPy array in device memory while it lives: a read-only one is input, a writable one is copied back and counts as
// unwritten before. Its address modulo 16 is kept, so that slices test misaligned tensors.
class Array {
 public:
  explicit Array(py::array array);
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

}  // namespace fastgan::simt_bindings
