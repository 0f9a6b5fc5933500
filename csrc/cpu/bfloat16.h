// The upper half of a float, as it is stored.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float widened(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline bfloat16 narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded)};
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
