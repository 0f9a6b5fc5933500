#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/operators.h"

namespace fastgan::cpu {

FASTGAN_DECLARE(const char* compiled_instruction_set();)
FASTGAN_IF_AVX512(namespace avx512 { const char* compiled_instruction_set(); })
FASTGAN_IF_AMX(namespace amx { const char* compiled_instruction_set(); })

namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512", "amx"};

// Linux saves the large registers of AMX only for a process that asks for them.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// The best that there is; tiles, which the system is asked for, only where they are wanted.
Isa best(bool tiles) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  FASTGAN_IF_AMX(if (tiles && avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
                     __builtin_cpu_supports("amx-bf16") && may_use_tiles()) return Isa::amx;)
  FASTGAN_IF_AVX512(if (avx512) return Isa::avx512;)
  FASTGAN_IF_AVX2(if (avx2) return Isa::avx2;)
#endif
  return Isa::plain;
}

Isa choose() {
  const char* asked = std::getenv("FASTGAN_CPU");
  if (asked == nullptr || *asked == '\0') return best(true);
  Isa found = best(asked == std::string("amx"));
  for (int i = 0; i < 4; i++) {
    if (std::string(asked) != names[i]) continue;
    STD_TORCH_CHECK(i <= static_cast<int>(found), "FASTGAN_CPU=", asked, ": this processor and build offer at most ",
                    names[static_cast<int>(found)]);
    return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "FASTGAN_CPU must be plain, avx2, avx512 or amx, got ", asked);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

std::string instruction_set() {
  FASTGAN_IF_AMX(if (isa() == Isa::amx) return amx::compiled_instruction_set();)
  FASTGAN_IF_AVX512(if (isa() == Isa::avx512) return avx512::compiled_instruction_set();)
  return FASTGAN_DISPATCH(compiled_instruction_set());
}

}  // namespace fastgan::cpu
