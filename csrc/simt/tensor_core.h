// What mma.sync, ldmatrix and cp.async do, as collectives of the host runtime; cuda/tensor_core.cuh has the PTX.
#pragma once
#include "simt/cuda.h"

namespace simt {

struct MmaArguments {
  float* d;
  const unsigned *a, *b;
};

// d += a * b for fragments of mma.m16n8k16: a is 16x16 row-major, b 16x8 column-major, d 16x8.
template <class T>
void mma_m16n8k16(void** lanes, unsigned) {
  auto element = [](unsigned word, unsigned half) {
    T value{static_cast<uint16_t>(half ? word >> 16 : word & 0xffff)};
    if constexpr (std::is_same_v<T, __half>) return __half2float(value);
    else return __bfloat162float(value);
  };
  float a[16][16], b[16][8];
  for (unsigned l = 0; l < warp_size; l++) {
    auto* lane = static_cast<MmaArguments*>(lanes[l]);
    unsigned group = l / 4, pair = l % 4 * 2;
    for (unsigned i = 0; i < 8; i++) a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = element(lane->a[i / 2], i % 2);
    for (unsigned i = 0; i < 4; i++) b[pair + i % 2 + i / 2 * 8][group] = element(lane->b[i / 2], i % 2);
  }
  for (unsigned l = 0; l < warp_size; l++) {
    auto* lane = static_cast<MmaArguments*>(lanes[l]);
    for (unsigned i = 0; i < 4; i++) {
      unsigned row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      float sum = 0;
      for (unsigned k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      lane->d[i] += sum;
    }
  }
}

struct LdmatrixArguments {
  unsigned* result;
  uint16_t row[8];
};

// Four 8x8 matrices of 16-bit elements; lane 8 i + r brings the address of row r of matrix i.
template <bool transposed>
void ldmatrix_x4(void** lanes, unsigned) {
  auto element = [&](unsigned matrix, unsigned row, unsigned column) {
    return static_cast<unsigned>(static_cast<LdmatrixArguments*>(lanes[matrix * 8 + row])->row[column]);
  };
  for (unsigned l = 0; l < warp_size; l++)
    for (unsigned m = 0; m < 4; m++) {
      unsigned group = l / 4, pair = l % 4 * 2;
      unsigned low = transposed ? element(m, pair, group) : element(m, group, pair);
      unsigned high = transposed ? element(m, pair + 1, group) : element(m, group, pair + 1);
      static_cast<LdmatrixArguments*>(lanes[l])->result[m] = low | high << 16;
    }
}

}  // namespace simt
