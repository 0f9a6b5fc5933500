// Whether a tensor's elements fill memory without gaps or overlaps, in whatever order of its dimensions.
#pragma once
#include <cstdint>

namespace fastgan {

template <class Tensor>
bool is_dense(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t filled = 1;  // elements, by the dimensions found so far
  for (int64_t found = 0; found < t.dim(); found++) {
    bool grew = false;
    for (int64_t d = 0; d < t.dim() && !grew; d++) {
      if (t.size(d) == 1 || t.stride(d) != filled) continue;
      filled *= t.size(d);
      grew = true;
    }
    if (!grew) break;
  }
  return filled == t.numel();
}

}  // namespace fastgan
