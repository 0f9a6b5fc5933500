// The instructions of AMX in software, for a processor without them: with `-include software_tiles.h` the kernels' own code
// runs on tiles that are memory, which sanitisers see, too. Its conversions to bf16 are the processor's (AVX-512 BF16).
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#if !defined(FASTGAN_ISA)  // isa.cpp finds AMX, which the system lends
#define __builtin_cpu_supports(name) (__builtin_strncmp(name, "amx-", 4) == 0 || __builtin_cpu_supports(name))
#define syscall(...) 0L
#elif defined(__AMX_BF16__)
#include <immintrin.h>

namespace software_tiles {
namespace {

constexpr int rows = 16, row_bytes = 64;
typedef float Row __attribute__((vector_size(row_bytes)));
typedef uint32_t Bits __attribute__((vector_size(row_bytes)));
thread_local Bits tiles[8][rows];
thread_local bool configured = false;

// Denormal numbers count as 0.
inline Row normal(Bits bits) { return (Row)((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits); }

inline void load(int tile, const void* from, int64_t stride) {
  if (!configured) __builtin_trap();
  for (int i = 0; i < rows; i++) std::memcpy(&tiles[tile][i], static_cast<const char*>(from) + i * stride, row_bytes);
}

inline void store(int tile, void* to, int64_t stride) {
  if (!configured) __builtin_trap();
  for (int i = 0; i < rows; i++) std::memcpy(static_cast<char*>(to) + i * stride, &tiles[tile][i], row_bytes);
}

inline void zero(int tile) {
  if (!configured) __builtin_trap();
  for (Bits& row : tiles[tile]) row = Bits{};
}

// Sums of even and of odd products, from 0 on, are added to what is there: Intel's manual, TDPBF16PS.
inline void multiply(int sums, int a, int b) {
  if (!configured) __builtin_trap();
  for (int i = 0; i < rows; i++) {
    Row even{}, odd{};
    for (int k = 0; k < rows; k++) {
      Bits left = Bits{} + tiles[a][i][k], right = tiles[b][k];
      even = normal((Bits)_mm512_fmadd_ps(normal(left << 16), normal(right << 16), even));
      odd = normal((Bits)_mm512_fmadd_ps(normal(left & 0xffff0000), normal(right & 0xffff0000), odd));
    }
    tiles[sums][i] = (Bits)normal((Bits)((Row)tiles[sums][i] + normal((Bits)(even + odd))));
  }
}

}  // namespace
}  // namespace software_tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(configuration) (software_tiles::configured = true)
#define _tile_release() (software_tiles::configured = false)
#define _tile_loadd(tile, from, stride) software_tiles::load(tile, from, stride)
#define _tile_stored(tile, to, stride) software_tiles::store(tile, to, stride)
#define _tile_zero(tile) software_tiles::zero(tile)
#define _tile_dpbf16ps(sums, a, b) software_tiles::multiply(sums, a, b)
#endif
