"""Where the ahead-of-time budget lies, and what exceeds it. Free of Triton: the compiling is `tests/aot.py`'s."""

from pathlib import Path

SCRIPT = Path(__file__).parent / "aot.py"
BUDGET = Path(__file__).parent / "aot_budget.json"


AT_LEAST = ("loads of 16 bytes", "stores of 16 bytes", "matrix instructions", "asynchronous copies")


def excess(found: dict[str, int], budget: dict[str, int]) -> list[str]:
    """What is above its budget, or, of what is wanted, below it. A stack is a spill: none is allowed."""
    limits = {**budget, "stack": 0}
    return [
        f"{key} {found[key]}, budget {limit}"
        for key, limit in limits.items()
        if (found[key] < limit if key in AT_LEAST else found[key] > limit)
    ]
