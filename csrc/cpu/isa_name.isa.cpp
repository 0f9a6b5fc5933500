// What this copy was really compiled for, from the compiler's own macros: proves that the flags of a set arrive.
namespace fastgan::cpu::FASTGAN_ISA {

const char* compiled_instruction_set() {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
  return "amx";
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
  return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
  return "avx2";
#else
  return "plain";
#endif
}

}  // namespace fastgan::cpu::FASTGAN_ISA
