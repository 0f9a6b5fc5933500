"""Write the tables and pictures of README.md and docs/speed*.md: `python benchmarks/readme_table.py`.

Each folder in benchmarks/results is a machine, named after the best of its instructions. It holds what `python -m
fastgan.bench --json` (step-*.json, and instruction-set-*.json where FASTGAN_CPU was set), `pytest benchmarks/ --rows`
(layers-*.json, operations-*.json) and `python benchmarks/default_run.py --json` (default-run.json) wrote. A page holds
a table between `<!-- NAME MACHINE -->` and `<!-- end -->`.
"""

import json
import re
import statistics
import sys
from pathlib import Path

import goals as wanted

from fastgan.bench import plot, results
from fastgan.bench.cases import CASES
from fastgan.bench.machine import best_of
from fastgan.bench.pairing import Interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MACHINES = tuple(sorted(path.name for path in RESULTS.iterdir() if path.is_dir()))
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"speed{which}.md" for which in ("", "-avx2", "-avx512")))


def picture(machine: str) -> Path:
    return RESULTS / machine / "speed.png"


def documents(machine: str, pattern: str) -> list[dict]:
    """The files that `python -m fastgan.bench` wrote."""
    return [results.read(path) for path in sorted((RESULTS / machine).glob(pattern))]


def peaks(machine: str) -> dict[str, float]:
    """What every share is of: the best of all sessions, for a machine shared with others shows its peak only now and
    then."""
    every = (json.loads(path.read_text()) for path in sorted((RESULTS / machine).glob("*.json")))
    return best_of(*(data["peaks"] for data in every if "peaks" in data))


def step_rows(machine: str) -> list[results.Row]:
    """Every measured step, in the order of the cases."""
    order = [case.name for case in CASES]
    rows = (row for data in documents(machine, "step-*.json") for row in data["rows"])
    return sorted(rows, key=lambda row: order.index(row["case"]))


def shown_rows(machine: str) -> list[results.Row]:
    """What README and picture show. Not 16 bits where PyTorch emulates them: 50 times as fast."""
    best = peaks(machine)
    rows = step_rows(machine)
    return [row for row in rows if best[f"{row['precision']} GFLOP/s"] >= best["fp32 GFLOP/s"] / 10]


def pairs(machine: str, name: str) -> list[dict]:
    paths = sorted((RESULTS / machine).glob(f"{name}-*.json"))
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def table(heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "No data committed yet."
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(machine: str) -> str:
    """The steps as the README shows them."""
    heads = ["training step", "stock images/s", "fastgan images/s", "times stock", "times the best other"]
    return table(
        heads,
        [
            [
                row["case"],
                f"{results.images_per_second(row, 'stock'):,.0f}",
                f"{results.images_per_second(row):,.0f}",
                f"**{results.times_as_fast(row, 'stock').median:.2f}**",
                f"{results.times_as_fast(row, results.best_other(row)).median:.2f} ({results.best_other(row)})",
            ]
            for row in shown_rows(machine)
        ],
    )


def steps(machine: str) -> str:
    """The steps with intervals, and how far from the floor they are."""
    best = peaks(machine)
    heads = [
        "training step",
        "ms",
        "times stock",
        "times tuned",
        "times compiled",
        "floor, ms",
        "of the floor",
        "GFLOP/s",
    ]
    return table(
        heads,
        [
            [
                row["case"],
                f"{1e3 * results.step_seconds(row):.1f}",
                *(_times(row, name) for name in ("stock", "tuned", "compiled")),
                f"{1e3 * sum(results.floor_seconds(row, best).values()):.1f}",
                f"{100 * results.floor_share(row, best):.0f} %",
                f"{results.gflops(row):.0f}",
            ]
            for row in step_rows(machine)
        ],
    )


def options(machine: str) -> str:
    """Fastgan's options beside fastgan without them."""
    found = [(row, name) for row in step_rows(machine) for name in row["seconds"] if name.startswith("fastgan ")]
    return table(
        ["training step", "option", "ms", "times fastgan"],
        [
            [
                row["case"],
                name.removeprefix("fastgan "),
                f"{1e3 * results.step_seconds(row, name):.1f}",
                str(results.times_as_fast(row, "fastgan", name)),
            ]
            for row, name in found
        ],
    )


def _times(row: results.Row, name: str) -> str:
    return str(results.times_as_fast(row, name)) if name in row["seconds"] else "-"


def profile(machine: str) -> str:
    """The operations of a step that take most of its time."""
    return table(
        ["training step", "operation", "calls", "ms", "share"],
        [
            [
                row["case"],
                f"`{taken['name']}`",
                f"{taken['calls']:.0f}",
                f"{1e3 * taken['seconds']:.1f}",
                f"{100 * taken['share']:.1f} %",
            ]
            for row in step_rows(machine)
            for taken in row.get("profile", [])
        ],
    )


def memory(machine: str) -> str:
    """Peak memory of a training process, and bytes kept for backward."""
    mib = 2**20
    found = []
    for row in step_rows(machine):
        if "peak_bytes" not in row:
            continue
        peak, kept = row["peak_bytes"], row["kept_bytes"]
        line = [row["case"]]
        for name in ("stock", "tuned", "fastgan"):
            line.append("-" if peak[name] is None else f"{peak[name] / mib:.0f}")
        for network in ("generator", "discriminator"):
            line.append(
                f"{kept['fastgan'][network] / mib:.1f} ({kept['fastgan'][network] / kept['tuned'][network]:.2f})"
            )
        found.append(line)
    heads = [
        "training step",
        "peak MiB, stock",
        "tuned",
        "fastgan",
        "kept MiB, generator (of eager's)",
        "discriminator",
    ]
    return table(heads, found)


def layer_rows(machine: str) -> list[dict]:
    return [row for row in pairs(machine, "layers") if row["provider"] == "cpu"]


def layers(machine: str) -> str:
    """Each layer and pass on the CPU kernels beside the library, channels-last."""
    found, best = layer_rows(machine), peaks(machine)["fp32 GFLOP/s"]
    heads = ["pass", "layer", "ms", "GFLOP/s", "share of peak", "times the library"]
    return table(
        heads,
        [
            [
                row["group"],
                row["name"],
                f"{1e3 * row['seconds']:.2f}",
                f"{row['GFLOP/s']:.0f}",
                f"{100 * row['GFLOP/s'] / best:.0f} %",
                str(Interval(*row["times_reference"])),
            ]
            for row in found
        ],
    )


def operations(machine: str) -> str:
    """Each operation and competitor beside its reference."""
    best = peaks(machine)["copy GB/s"]
    return table(
        ["operation", "case", "competitor", "ms", "times the reference", "share of copy bandwidth"],
        [
            [
                row["group"],
                row["name"],
                row["provider"],
                f"{1e3 * row['seconds']:.3f}",
                str(Interval(*row["times_reference"])),
                f"{100 * row['GB/s'] / best:.0f} %" if "GB/s" in row else "-",
            ]
            for row in pairs(machine, "operations")
        ],
    )


def default_run(machine: str) -> str:
    """`python -m fastgan.train` by backend."""
    data = json.loads((RESULTS / machine / "default-run.json").read_text())
    rates = {row["backend"]: row["images_per_second"] for row in data["rows"]}
    eager = statistics.median(rates["eager"])
    return table(
        ["default run", "images/s", "times eager"],
        [
            [f"`--backend {name}`", f"{statistics.median(rate):,.0f}", f"{statistics.median(rate) / eager:.2f}"]
            for name, rate in rates.items()
        ],
    )


def goals(machine: str) -> str:
    """What a CPU's speed shall be, and what was measured."""
    best = peaks(machine)
    found = [
        *wanted.of_steps(step_rows(machine)),
        *wanted.of_layers(layer_rows(machine), best),
        *wanted.of_operations(pairs(machine, "operations"), best),
    ]
    return table(["what", "goal", "measured", "at the peak", "reached"], [goal.line() for goal in found])


def instruction_sets(machine: str) -> str:
    """The step with the instruction set forced that the kernels may use at most."""
    found = documents(machine, "instruction-set-*.json")
    return table(
        ["`FASTGAN_CPU`", "training step", "stock ms", "fastgan ms", "times stock", "times tuned"],
        [
            [
                data["environment"]["kernels"],
                row["case"],
                *(f"{1e3 * results.step_seconds(row, name):.1f}" for name in ("stock", "fastgan")),
                *(_times(row, name) for name in ("stock", "tuned")),
            ]
            for data in found
            for row in data["rows"]
        ],
    )


def name_of(machine: str) -> str:
    return documents(machine, "step-*.json")[0]["environment"]["machine"]


def measured_on(machine: str) -> str:
    """Machine, versions and commits of the steps."""
    found = documents(machine, "step-*.json")
    env = found[0]["environment"]
    rates = ", ".join(f"{rate:.0f} {name}" for name, rate in peaks(machine).items())
    commits = ", ".join(sorted({data["environment"]["commit"] for data in found}))
    return (
        f"Measured on {env['machine']} ({env['capability']}; measured peaks: {rates}) with PyTorch "
        f"{env['versions']['torch']}, commits {commits}."
    )


def commands(machine: str) -> str:
    """What wrote the data."""
    every = [json.loads(path.read_text())["environment"] for path in sorted((RESULTS / machine).glob("*.json"))]
    return "\n".join(f"- `{env['command']}` at {env['commit']}" for env in every)


TABLES = {
    f.__name__.replace("_", "-"): f
    for f in (
        speed,
        goals,
        steps,
        options,
        profile,
        memory,
        layers,
        operations,
        default_run,
        instruction_sets,
        measured_on,
        commands,
    )
}


def written(text: str) -> str:
    """A page with every table in its place."""

    def fill(match: re.Match) -> str:
        if match[2] not in MACHINES:
            raise ValueError(f"<!-- {match[1]} {match[2]} -->: no folder of that name is in {RESULTS}")
        return f"<!-- {match[1]} {match[2]} -->\n\n{TABLES[match[1]](match[2])}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) (\w+) -->.*?<!-- end -->", fill, text, flags=re.S)


def main() -> None:
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    for machine in MACHINES:
        plot.draw(shown_rows(machine), name_of(machine), picture(machine))


if __name__ == "__main__":
    sys.exit(main())
