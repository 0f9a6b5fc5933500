// From a run-time element type to a template: by_element(element, [&]<class T>() { ... }).
#pragma once
#include "cuda/device.cuh"
#include "cuda/element.h"

namespace fastgan::cuda {

template <class F>
int by_element(Element element, F&& f) {
  switch (element) {
    case Element::f32: return f.template operator()<float>();
    case Element::f16: return f.template operator()<__half>();
    default: return f.template operator()<__nv_bfloat16>();
  }
}

}  // namespace fastgan::cuda
