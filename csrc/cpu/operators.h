// The CPU operators that registration.cpp registers.
#pragma once
#include <string>

namespace fastgan::cpu {

// The instruction set whose kernels run here: "plain", "avx2", "avx512" or "avx512_bf16".
std::string instruction_set();

}  // namespace fastgan::cpu
