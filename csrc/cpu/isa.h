// Run-time choice of the instruction set. A file NAME.isa.cpp is compiled once per set with FASTGAN_ISA=plain, avx2,
// avx512 and avx512_bf16 and puts its functions into namespace fastgan::cpu::FASTGAN_ISA; FASTGAN_DISPATCH calls the
// copy for this processor. Keep everything else in such a file in an unnamed namespace or that one: an inline function
// that several sets share would be linked once, for whichever set came first.
#pragma once

namespace fastgan::cpu {

enum class Isa { plain, avx2, avx512, avx512_bf16 };

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
#ifdef FASTGAN_HAS_AVX512_BF16
#define FASTGAN_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define FASTGAN_IF_AVX512_BF16(...)
#endif

// Declares a function of every compiled set: FASTGAN_DECLARE(void scale(float* x, int64_t n);)
#define FASTGAN_DECLARE(...)                              \
  namespace plain { __VA_ARGS__ }                         \
  FASTGAN_IF_AVX2(namespace avx2 { __VA_ARGS__ })         \
  FASTGAN_IF_AVX512(namespace avx512 { __VA_ARGS__ })     \
  FASTGAN_IF_AVX512_BF16(namespace avx512_bf16 { __VA_ARGS__ })

// Calls it: FASTGAN_DISPATCH(scale(x, n)), usable as an expression, from within namespace fastgan::cpu.
#define FASTGAN_DISPATCH(...)                                                            \
  [&] {                                                                                  \
    switch (isa()) {                                                                     \
      FASTGAN_IF_AVX512_BF16(case Isa::avx512_bf16: return avx512_bf16::__VA_ARGS__;)    \
      FASTGAN_IF_AVX512(case Isa::avx512: return avx512::__VA_ARGS__;)                   \
      FASTGAN_IF_AVX2(case Isa::avx2: return avx2::__VA_ARGS__;)                         \
      default: return plain::__VA_ARGS__;                                                \
    }                                                                                    \
  }()

// The same for kernels that no AVX-512 machine has run yet: at most their AVX2 copy.
#define FASTGAN_PROVED(...)                                                            \
  [&] {                                                                                \
    FASTGAN_IF_AVX2(if (isa() != Isa::plain) return avx2::__VA_ARGS__;)                \
    return plain::__VA_ARGS__;                                                         \
  }()

}  // namespace fastgan::cpu
