// Products of bf16 matrices on AMX: eight registers, tiles, of 16 rows of 64 bytes. One instruction adds to a tile of 16 x 16
// sums in fp32 the products of 16 rows of A, 32 values each, with 16 columns of B, of which a tile's row holds two values of
// each column:
//   A [16 rows][32]        B [16 pairs of 32][16 columns][2]        sums [16 rows][16 columns]
// Two tiles of A and two of B make four of sums: one load for each product, as many as the caches deliver in its 16 cycles.
#pragma once
#include "cpu/bfloat16.h"
#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t tile_rows = 16, tile_columns = 16, tile_depth = 32;
constexpr int64_t tile_weights = tile_depth * tile_columns;  // of a tile of B

inline int64_t tiles_of(int64_t values) { return (values + tile_rows - 1) / tile_rows; }
inline int64_t steps_of(int64_t depth) { return (depth + tile_depth - 1) / tile_depth; }

struct TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);
alignas(64) constexpr TileConfiguration all_tiles;

// A thread's tiles, all of full size: the library may have set other ones, and finds none set after it. Compilers do not know
// that loads of tiles read memory: what was written before stands there from here on.
struct Tiles {
  Tiles() {
    asm volatile("" ::: "memory");
    _tile_loadconfig(&all_tiles);
  }
  ~Tiles() {
    _tile_release();
    asm volatile("" ::: "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// R x V tiles of sums, in tiles 0 .. 3; c[r] is the first of row r, its rows and those of its neighbour `stride` floats apart.
template <int R, int V>
struct Sums {
  FASTGAN_INLINE static void zero() {
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && V > 1) _tile_zero(3);
  }

  FASTGAN_INLINE static void load(float* const (&c)[2], int64_t stride) {
    _tile_loadd(0, c[0], stride * 4);
    if constexpr (V > 1) _tile_loadd(1, c[0] + tile_columns, stride * 4);
    if constexpr (R > 1) _tile_loadd(2, c[1], stride * 4);
    if constexpr (R > 1 && V > 1) _tile_loadd(3, c[1] + tile_columns, stride * 4);
  }

  FASTGAN_INLINE static void store(float* const (&c)[2], int64_t stride) {
    _tile_stored(0, c[0], stride * 4);
    if constexpr (V > 1) _tile_stored(1, c[0] + tile_columns, stride * 4);
    if constexpr (R > 1) _tile_stored(2, c[1], stride * 4);
    if constexpr (R > 1 && V > 1) _tile_stored(3, c[1] + tile_columns, stride * 4);
  }

  FASTGAN_INLINE static void load_a(const bfloat16* a0, const bfloat16* a1) {
    _tile_loadd(4, a0, 64);
    if constexpr (R > 1) _tile_loadd(5, a1, 64);
  }
  FASTGAN_INLINE static void load_b(const bfloat16* b0, const bfloat16* b1) {
    _tile_loadd(6, b0, 64);
    if constexpr (V > 1) _tile_loadd(7, b1, 64);
  }
  FASTGAN_INLINE static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R > 1 && V > 1) _tile_dpbf16ps(3, 5, 7);
  }

  // Of numbers in one part each, or in three, a_part and b_part apart: then the six products of parts of which any other is
  // below the last digit of a float, in an order in which one of two operands stays.
  template <int count>
  FASTGAN_INLINE static void add(const bfloat16* a0, const bfloat16* a1, int64_t a_part, const bfloat16* b0, const bfloat16* b1,
                                 int64_t b_part) {
    if constexpr (count == 3) {
      load_a(a0 + 2 * a_part, a1 + 2 * a_part), load_b(b0, b1), multiply();
      load_a(a0 + a_part, a1 + a_part), multiply();
      load_b(b0 + b_part, b1 + b_part), multiply();
      load_a(a0, a1), multiply();
      load_b(b0 + 2 * b_part, b1 + 2 * b_part), multiply();
      load_b(b0, b1), multiply();
    } else {
      load_a(a0, a1), load_b(b0, b1), multiply();
    }
  }
};

// Calls f with the constants R and V of a block of one or two by one or two tiles.
template <class F>
FASTGAN_INLINE void with_tiles(bool two_rows, bool two_columns, const F& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (two_rows) {
    two_columns ? f(Two(), Two()) : f(Two(), One());
  } else {
    two_columns ? f(One(), Two()) : f(One(), One());
  }
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
