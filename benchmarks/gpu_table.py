"""Write the tables of docs/gpu.md: `python benchmarks/gpu_table.py`.

docs/data/traffic.json is what `python benchmarks/traffic.py --json` counted and modelled, docs/data/waves.json what
`python benchmarks/waves.py --json` counted, tests/aot_budget/3.9.json what
`python tests/aot.py --write` read in the compiled kernels. The page holds a table between `<!-- NAME -->` and
`<!-- end -->`.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu.md"
TRAFFIC = ROOT / "docs" / "data" / "traffic.json"
WAVES = ROOT / "docs" / "data" / "waves.json"
BUDGET = ROOT / "tests" / "aot_budget" / "3.9.json"
# Kinds of launches that ATen names one by one.
KINDS = {
    "convolutions and their gradients": r"convolution|dgrad|wgrad|_convolve_kernel|_weight_gradient_kernel",
    "BatchNorm, forward and backward": r"batch_norm|_stats_|_combine_|_apply_|_reduce_|_sum_|^_backward_|rsqrt",
    "activations": r"relu|threshold|tanh",
    "losses": r"sigmoid|bce|neg$|mean$|\.div$|ones_like|\.mul$|stack|_to_copy",
    "optimisers, counters of batches": r"_foreach_|adam|add_$",
}
REST = "the rest: sums of gradients, zeros"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def traffic() -> dict:
    return json.loads(TRAFFIC.read_text(encoding="utf-8"))


def modelled() -> str:
    heads = ["DCGAN, batch", "step by", "launches", "of eager's", "GB moved", "outside convolutions", "kept G",
             "kept D", "D, first recomputed", "step ms", "as a graph ms"]  # fmt: skip
    rows, eager = [], {}
    for row in traffic()["rows"]:
        eager = row if row["provider"] == "eager" else eager
        seconds = row["modelled_seconds"]
        kept = [
            f"{row[f'bytes_kept_{name}'] / eager[f'bytes_kept_{of}']:.2f}"
            for name, of in (
                ("generator", "generator"),
                ("discriminator", "discriminator"),
                ("discriminator_first_recomputed", "discriminator"),
            )
        ]
        rows.append([
            f"{row['image_size']}, {row['batch_size']}", row["provider"],
            str(row["launches"]), f"{row['launches'] / eager['launches']:.2f}",
            f"{(row['bytes_read'] + row['bytes_written']) / 1e9:.2f}", f"{row['bytes_elsewhere'] / 1e9:.2f}", *kept,
            f"{1e3 * seconds['step']:.2f}", f"{1e3 * seconds['graph']:.2f}",
        ])  # fmt: skip
    return table(heads, rows)


def launches() -> str:
    rows = [row for row in traffic()["rows"] if (row["image_size"], row["batch_size"]) == (64, 32)]
    counted = {row["provider"]: {name: 0 for name in (*KINDS, REST)} for row in rows}
    for row in rows:
        for name, times in row["launches_by_kind"].items():
            kind = next((kind for kind, names in KINDS.items() if re.search(names, name)), REST)
            counted[row["provider"]][kind] += times
    providers = list(counted)
    lines = [[kind, *(str(counted[name][kind]) for name in providers)] for kind in counted[providers[0]]]
    lines.append(["all", *(str(row["launches"]) for row in rows)])
    return table([f"launches of a DCGAN-64 step, batch {rows[0]['batch_size']}", *providers], lines)


def passes() -> str:
    found = traffic()["beside_convolutions_per_block"]
    return table(
        ["per block, beside its bare convolution", *found],
        [
            ["passes over an activation, per image", *(f"{of['passes']:.2f}" for of in found.values())],
            ["MB whatever the batch", *(f"{of['constant'] / 1e6:.1f}" for of in found.values())],
        ],
    )


def resources() -> str:
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    keys = ["registers", "stack", "shared", "matrix instructions", "asynchronous copies", "ordered arrivals",
            "loads of 16 bytes", "stores of 16 bytes"]  # fmt: skip
    heads = ["kernel, architecture", "registers", "spilled bytes", "shared bytes", *keys[3:]]
    names = sorted((name.partition(" ")[::2] for name in budget if re.search(r" (conv_|block_)", name)),
                   key=lambda pair: (pair[1], int(pair[0][3:])))  # fmt: skip
    return table(heads, [
        [f"{name}, {architecture}", *(str(budget[f"{architecture} {name}"].get(key, "-")) for key in keys)]
        for architecture, name in names
    ])  # fmt: skip


def waves() -> str:
    rows = json.loads(WAVES.read_text(encoding="utf-8"))
    heads = ["DCGAN, batch", "card", "launches", "of one wave", "of two waves", "of more", "places empty",
             "persistent saves at most"]  # fmt: skip
    return table(heads, [
        [f"{row['image_size']}, {row['batch_size']}", row["card"], *(str(row[key]) for key in heads[2:6]),
         *(f"{100 * row[key]:.0f} %" for key in heads[6:])]
        for row in rows
    ])  # fmt: skip


def source() -> str:
    data = traffic()
    card = data["card"]
    return (
        f"Counted with torch {data['versions']['torch']} and triton {data['versions']['triton']}; modelled for "
        f"{card['bandwidth'] / 1e12:g} TB/s and {card['rate'] / 1e12:g} TFLOP/s ({card['source']}) and "
        f"{data['config']['launch_cost'] * 1e6:g} us of the host for a launch, an assumption."
    )


TABLES = {f.__name__: f for f in (modelled, launches, passes, resources, waves, source)}


def written(text: str) -> str:
    """The page with every table in its place."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->.*?<!-- end -->", fill, text, flags=re.S)


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
