// Working memory that each thread keeps: fresh memory from the system costs a page fault per 4 KB, a tenth of a step.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

enum class Scratch { weight, weights, large, small, image, sums, partial, even, odd, count };

constexpr size_t huge_page = 2 << 20;

// At least n elements on a 64-byte boundary, of any content; the same memory at each call for the same use. Transforms write
// to some thirty places at once, more than processors keep addresses of pages of 4 KB for: what is large asks for pages of 2 MB.
template <class T>
T* scratch(Scratch use, int64_t n) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t bytes = 0;
  };
  thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& b = buffers[static_cast<int>(use)];
  size_t bytes = static_cast<size_t>(n) * sizeof(T), page = bytes < huge_page / 8 ? 64 : huge_page;
  bytes = (bytes + page - 1) / page * page;
  if (bytes > b.bytes) {
    b.bytes = 0;
    b.memory.reset();
    b.memory.reset(std::aligned_alloc(page, bytes));
    if (!b.memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE  // Linux
    if (page == huge_page) madvise(b.memory.get(), bytes, MADV_HUGEPAGE);
#endif
    b.bytes = bytes;
  }
  return static_cast<T*>(b.memory.get());
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
