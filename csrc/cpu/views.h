// From the plain pointers of convolution.h to what block.h reads and writes, and from a result's partial sums to its sums.
#pragma once
#include "cpu/block.h"
#include "cpu/convolution.h"
#include "cpu/scratch.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

struct Sizes {
  int64_t N, C, LH, LW, K, H, W;
};

inline Sizes sizes_of(const Convolution& c) { return {c.N, c.C, c.LH, c.LW, c.K, c.H, c.W}; }

template <class T, class S = T>
Source<T, S> source_of(const OperandView& v) {
  Source<T, S> s;
  s.a = static_cast<const S*>(v.a), s.b = static_cast<const S*>(v.b);
  s.constants = static_cast<const T*>(v.constants), s.slope = static_cast<T>(v.slope);
  s.images_per_set = v.images_per_set;
  s.kind = v.b ? Operand::gradient : v.constants ? Operand::activation : Operand::plain;
  return s;
}

template <class T, class S = T>
struct Output {
  Sink<T, S> sink;
  T* sums;

  Output(const ResultView& v, int64_t N, int64_t H, int64_t W, int64_t C) : sums(static_cast<T*>(v.sums)) {
    sink.out = static_cast<S*>(v.out), sink.y = static_cast<const S*>(v.y);
    sink.constants = static_cast<const T*>(v.constants), sink.slope = static_cast<T>(v.slope);
    sink.images_per_set = v.images_per_set;
    sink.kind = v.y ? Finish::backward : v.sums ? Finish::statistics : Finish::plain;
    if (sums) sink.partial = scratch<T>(Scratch::partial, N * blocks_per_image(H, W) * 2 * C);
  }
  void combine(int64_t N, int64_t H, int64_t W, int64_t C) const {
    if (!sums) return;
    int64_t step = block_rows(W), per_image = blocks_per_image(H, W);
    auto count_of = [&](int64_t block) { return std::min(step, H - block % per_image * step) * W; };
    int64_t blocks = sink.images_per_set * per_image;
    for (int64_t set = 0; set * sink.images_per_set < N; set++) {
      combine_blocks(sink.kind, sink.partial + set * blocks * 2 * C, blocks, count_of, C, sums + set * 2 * C);
    }
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
