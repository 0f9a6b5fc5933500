#define FASTGAN_ISA plain
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace fastgan::cpu {
namespace {

// The items first .. last - 1 that nobody has taken yet, both in one word.
class Share {
 public:
  void set(int64_t first, int64_t last) { left = first << 32 | last; }
  // One from the front or the back; -1: there is none.
  int64_t take(bool front) {
    for (int64_t now = left.load(std::memory_order_relaxed);;) {
      int64_t first = now >> 32, last = now & 0xffffffff;
      if (first == last) return -1;
      int64_t rest = front ? (first + 1) << 32 | last : first << 32 | (last - 1);
      if (left.compare_exchange_weak(now, rest, std::memory_order_relaxed)) return front ? first : last - 1;
    }
  }

 private:
  alignas(64) std::atomic<int64_t> left;
};

constexpr int64_t most_threads = 128;  // which items are shared out to; 8 KB of stack

}  // namespace

// Each thread takes its own share in order, so that it finds in its cache what it left there, then what others have not come to
// yet: cores are not equally fast, least so where others compute on them, too.
void parallel_items(int64_t count, void (*item)(const void* context, int64_t i), const void* context) {
  int64_t threads = std::min({thread_count(), count, most_threads});
  Share shares[most_threads];
  for (int64_t t = 0; t < threads; t++) shares[t].set(count * t / threads, count * (t + 1) / threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      for (int64_t i; (i = shares[t].take(true)) >= 0;) item(context, i);
      for (int64_t other = 1; other < threads; other++) {
        for (int64_t i; (i = shares[(t + other) % threads].take(false)) >= 0;) item(context, i);
      }
    }
  });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace fastgan::cpu
