"""Measuring honestly: what stands side by side ran side by side, and every number comes with its interval.

`cases` says what is measured, `steps` who competes, `pairing` how they are compared, `machine` and `floor` what the
machine could do at best, `memory` what is kept; `python -m fastgan.bench` is the command, and `benchmarks/` measures
single layers and operations by the same means.
"""
