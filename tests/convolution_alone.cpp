// One set's convolution kernels without torch and Python, against the definition in double: small enough for an emulator of
// a processor that is not at hand. Ends with status 1 where any case misses. test_convolution_alone.py compiles it.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/convolution.h"

#define FASTGAN_ISA SET
#include "cpu/parallel.h"

namespace fastgan::cpu {
void parallel_items(int64_t count, void (*item)(const void* context, int64_t i), const void* context) {
  for (int64_t i = 0; i < count; i++) item(context, i);
}
int64_t thread_count() { return 1; }
}  // namespace fastgan::cpu

using namespace fastgan::cpu;
using Values = std::vector<float>;

std::mt19937 generator(0);
Values draw(int64_t n, double scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  Values values(n);
  for (float& v : values) v = normal(generator);
  return values;
}

// Whether `got` is right: single precision leaves about 1e-7 of each result's terms, Winograd some times that.
bool right(const char* what, const Convolution& c, const Values& got, const std::vector<double>& truth) {
  double error = 0, size = 0;
  for (size_t i = 0; i < truth.size(); i++) error += std::pow(got[i] - truth[i], 2), size += truth[i] * truth[i];
  double relative = std::sqrt(error / size);
  bool ok = relative < 2e-6;  // NaN is not
  std::printf("%s %s N %ld C %ld K %ld %ldx%ld of %ldx%ld: relative RMS error %.1e\n", ok ? "right" : "WRONG", what, long(c.N),
              long(c.C), long(c.K), long(c.H), long(c.W), long(c.LH), long(c.LW), relative);
  return ok;
}

bool run(int64_t N, int64_t C, int64_t K, int64_t H, int64_t W, bool odd, bool channels_last) {
  int64_t LH = 2 * H + odd, LW = 2 * W + odd;
  Values large = draw(N * LH * LW * C), small = draw(N * H * W * K), weight = draw(K * C * 16, 1 / std::sqrt(16.0 * C));
  // Constants [A, B, C, mu] of the gradient and [mu, s, beta] of the activation, as the backward pass has them.
  Values raw = draw(small.size()), by = draw(4 * K), y = draw(large.size()), constants = draw(4 * C);
  double slope = 0.2;
  std::vector<double> gradient(small.size()), activated(large.size());
  std::vector<bool> negative(large.size());
  for (size_t i = 0; i < small.size(); i++) {
    int64_t k = i % K;
    gradient[i] = double(by[k]) * small[i] + double(by[K + k]) * (double(raw[i]) - by[3 * K + k]) + by[2 * K + k];
  }
  for (size_t i = 0; i < large.size(); i++) {
    auto v = [&](const Values& of) { return double(constants[C + i % C]) * (double(of[i]) - constants[i % C]) + constants[2 * C + i % C]; };
    activated[i] = v(large) * (v(large) > 0 ? 1 : slope), negative[i] = !(v(y) > 0);
  }
  std::vector<double> to_small(small.size()), to_large(large.size()), to_weight(weight.size());
  for (int64_t n = 0; n < N; n++) for (int64_t h = 0; h < H; h++) for (int64_t w = 0; w < W; w++) for (int64_t tap = 0; tap < 16; tap++) {
    int64_t ly = 2 * h + tap / 4 - 1, lx = 2 * w + tap % 4 - 1;
    if (ly < 0 || lx < 0 || ly >= LH || lx >= LW) continue;
    for (int64_t c = 0; c < C; c++) for (int64_t k = 0; k < K; k++) {
      int64_t i = ((n * LH + ly) * LW + lx) * C + c, o = ((n * H + h) * W + w) * K + k;
      int64_t at = channels_last ? (k * 16 + tap) * C + c : (k * C + c) * 16 + tap;
      to_small[o] += activated[i] * weight[at], to_large[i] += gradient[o] * weight[at], to_weight[at] += activated[i] * gradient[o];
    }
  }
  for (size_t i = 0; i < to_large.size(); i++) to_large[i] *= negative[i] ? slope : 1;

  OperandView activation{large.data(), nullptr, constants.data(), slope, N}, through{small.data(), raw.data(), by.data(), 1, N};
  bool ok = true;
  auto compute = [&](const char* what, Direction direction, const std::vector<double>& truth, ResultView result) {
    Values out(truth.size(), NAN), sums(2 * C);
    result.out = out.data(), result.images_per_set = N;
    if (result.y) result.sums = sums.data();
    Convolution c{direction, N, C, LH, LW, K, H, W, scheme_automatic};
    c.weight = weight.data(), c.weight_channels_last = channels_last, c.large = activation, c.small = through, c.result = result;
    SET::run_convolution(c);
    ok &= right(what, c, out, truth);
    if (!result.y) return;
    std::vector<double> truths(2 * C);
    for (size_t i = 0; i < truth.size(); i++) truths[i % C] += truth[i], truths[C + i % C] += truth[i] * (double(y[i]) - constants[i % C]);
    ok &= right("  sums of it", c, sums, truths);
  };
  compute("to small", Direction::to_small, to_small, {});
  compute("to large", Direction::to_large, to_large, {nullptr, nullptr, y.data(), constants.data(), slope});
  compute("to weight", Direction::to_weight, to_weight, {});
  return ok;
}

int main() {
  bool ok = true;
  for (bool channels_last : {false, true}) {
    for (int64_t C : {1, 2, 3, 4}) ok &= run(2, C, 40, 5, 4, C % 2, channels_last), ok &= run(1, C, 64, 3, 17, false, channels_last);
    for (int64_t C : {1, 2, 3, 4}) ok &= run(2, C, 130, 1, 70, C % 2, channels_last), ok &= run(1, C, 1, 6, 1, false, channels_last);
    ok &= run(4, 1, 1, 6, 5, false, channels_last);
    ok &= run(2, 16, 40, 5, 7, true, channels_last), ok &= run(2, 17, 24, 5, 6, true, channels_last);
    ok &= run(3, 64, 130, 6, 8, false, channels_last);
    ok &= run(3, 12, 24, 8, 9, true, channels_last), ok &= run(5, 24, 40, 4, 5, false, channels_last);
    ok &= run(5, 33, 128, 8, 8, false, channels_last);
    ok &= run(3, 8, 8, 72, 72, true, channels_last);  // in steps of some images
  }
  std::printf(ok ? "all right\n" : "some are WRONG\n");
  return !ok;
}
