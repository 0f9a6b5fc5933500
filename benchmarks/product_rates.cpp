// How many products a second one core computes, by instruction, from registers alone: which of them can pay in bf16.
//
// g++ -std=c++20 -O3 -mavx512f -mavx512bf16 -mamx-tile -mamx-bf16 benchmarks/product_rates.cpp -o /tmp/rates && /tmp/rates
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>

constexpr int calls = 1000000, sums = 16;  // independent ones, more than an instruction's latency times its rate

// The best of some rounds, in GFLOP/s: each runs `calls` times what takes `flop` operations.
template <class F>
double rate(double flop, const F& round) {
  double best = 0;
  for (int i = 0; i < 5; i++) {
    auto start = std::chrono::steady_clock::now();
    round();
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, calls * flop / seconds.count() / 1e9);
  }
  return best;
}

volatile float sink;  // what is never read would not be computed

template <class F>
void add_up(const F& add) {
  __m512 sum[sums];
  for (int j = 0; j < sums; j++) sum[j] = _mm512_set1_ps(j);  // equal ones would be computed once
  for (int i = 0; i < calls; i++) {
#pragma GCC unroll 16
    for (int j = 0; j < sums; j++) sum[j] = add(sum[j]);
  }
  for (__m512 s : sum) sink = s[0];
}

int main() {
  __m512 one = _mm512_set1_ps(1);
  __m512bh pairs = _mm512_cvtne2ps_pbh(one, one);
  std::printf("fp32, vfmadd231ps:   %6.0f GFLOP/s\n",
              rate(sums * 2 * 16, [&] { add_up([&](__m512 s) { return _mm512_fmadd_ps(one, one, s); }); }));
  std::printf("bf16, vdpbf16ps:     %6.0f GFLOP/s\n",
              rate(sums * 2 * 32, [&] { add_up([&](__m512 s) { return _mm512_dpbf16_ps(s, pairs, pairs); }); }));
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    std::puts("the system lends no tiles");
    return 1;
  }
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  _tile_loadconfig(&tiles);
  std::printf("bf16, tdpbf16ps:     %6.0f GFLOP/s\n", rate(4 * 2 * 16 * 16 * 32, [] {
                for (int i = 0; i < calls; i++) {
                  _tile_dpbf16ps(0, 4, 6);
                  _tile_dpbf16ps(1, 4, 7);
                  _tile_dpbf16ps(2, 5, 6);
                  _tile_dpbf16ps(3, 5, 7);
                }
              }));
  _tile_release();
}
