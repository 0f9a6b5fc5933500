// torch's own thread pool, one call per item: who computes an item never changes its result.
#pragma once
#include <torch/csrc/stable/ops.h>

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <class F>
void parallel(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
