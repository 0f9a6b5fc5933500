// Every operator of both libraries, once: its schema and its kernel. Compiled into each with FASTGAN_LIBRARY_CPU or
// FASTGAN_LIBRARY_CUDA. The public schemas, fakes and autograd formulas are Python's (fastgan/ops).
#include <torch/csrc/stable/library.h>

#ifdef FASTGAN_LIBRARY_CPU
#include "cpu/operators.h"

STABLE_TORCH_LIBRARY(fastgan_cpu, m) {
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fastgan::cpu::instruction_set));
}
#endif
