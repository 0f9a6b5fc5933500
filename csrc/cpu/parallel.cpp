#define FASTGAN_ISA plain
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fastgan::cpu {

void parallel_items(int64_t count, void (*item)(const void* context, int64_t i), const void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) item(context, i);
  });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace fastgan::cpu
