// Run-time choice of the instruction set. A file NAME.isa.cpp is compiled once per set with FASTGAN_ISA=plain, avx2, avx512
// and amx and puts its functions into namespace fastgan::cpu::FASTGAN_ISA. Keep everything else in such a file in an unnamed
// namespace or that one: an inline function that several sets share would be linked once, for whichever set came first.
//
// Convolutions in fp32 have a copy for AVX-512, with registers of 64 bytes: the same algorithms, twice the products per
// instruction. On AMX, which multiplies bf16, they are computed by their definition, in fp32 in three parts, but for those of a
// few channels. Elsewhere those in bf16 are the ones in fp32, which read and write it: AVX-512's own products of bf16 pairs are,
// on the processors that were measured, half as many a second as its fp32 ones. gan_bce, which computes much of few numbers, and
// bn_act, whose statistics take half as many instructions (a tenth of its time), have a copy for AVX-512, too. Everything else
// waits for memory, where wider registers gain nothing.
#pragma once

namespace fastgan::cpu {

enum class Isa { plain, avx2, avx512, amx };

// The best set that was compiled, that this processor runs, and that FASTGAN_CPU (a set's name) allows. Read once.
Isa isa();

#ifdef FASTGAN_HAS_AVX2
#define FASTGAN_IF_AVX2(...) __VA_ARGS__
#else
#define FASTGAN_IF_AVX2(...)
#endif
#ifdef FASTGAN_HAS_AVX512
#define FASTGAN_IF_AVX512(...) __VA_ARGS__
#else
#define FASTGAN_IF_AVX512(...)
#endif
#ifdef FASTGAN_HAS_AMX
#define FASTGAN_IF_AMX(...) __VA_ARGS__
#else
#define FASTGAN_IF_AMX(...)
#endif

// Declares a function of both sets that every kernel has: FASTGAN_DECLARE(void scale(float* x, int64_t n);)
#define FASTGAN_DECLARE(...)          \
  namespace plain { __VA_ARGS__ }     \
  FASTGAN_IF_AVX2(namespace avx2 { __VA_ARGS__ })

// Calls it: FASTGAN_DISPATCH(scale(x, n)), usable as an expression, from within namespace fastgan::cpu.
#define FASTGAN_DISPATCH(...)                                                \
  [&] {                                                                      \
    FASTGAN_IF_AVX2(if (isa() != Isa::plain) return avx2::__VA_ARGS__;)      \
    return plain::__VA_ARGS__;                                               \
  }()

// The same two for a function that has a copy for AVX-512.
#define FASTGAN_DECLARE_WIDE(...) \
  FASTGAN_DECLARE(__VA_ARGS__)    \
  FASTGAN_IF_AVX512(namespace avx512 { __VA_ARGS__ })
#define FASTGAN_DISPATCH_WIDE(...)                                                   \
  [&] {                                                                              \
    FASTGAN_IF_AVX512(if (isa() >= Isa::avx512) return avx512::__VA_ARGS__;)         \
    return FASTGAN_DISPATCH(__VA_ARGS__);                                            \
  }()

}  // namespace fastgan::cpu
