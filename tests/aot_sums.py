"""How many additions follow each other in the tl.sum of 1,024 numbers by one warp, by architecture, as JSON: run by
`tests/test_aot.py` in a process without the interpreter."""

import json
import os

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from aot_facts import longest_chain
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def _sum(out, numbers, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(numbers + tl.arange(0, N)), 0))


def chain(architecture: int) -> int:
    signature = {"out": "*fp32", "numbers": "*fp32", "N": "constexpr"}
    source = ASTSource(fn=_sum, signature=signature, constexprs={"N": 1024})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 1})
    return longest_chain(compiled.asm["ptx"])


if __name__ == "__main__":
    print(json.dumps({architecture: chain(architecture) for architecture in (80, 90)}))
