// torch's own thread pool, one call per item: who computes an item never changes its result. Behind a plain function, so
// that kernels are compiled without torch's headers: seconds for each instruction set.
#pragma once
#include <cstdint>

namespace fastgan::cpu {

void parallel_items(int64_t count, void (*item)(const void* context, int64_t i), const void* context);
int64_t thread_count();

namespace FASTGAN_ISA {
namespace {

template <class F>
void parallel(int64_t count, const F& f) {
  parallel_items(count, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, &f);
}

}  // namespace
}  // namespace FASTGAN_ISA
}  // namespace fastgan::cpu
