"""What `benchmarks/` writes of its measurements: the pages' tables and goals, measured_cpu.json, Winograd's errors."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fastgan import library
from fastgan.backends import counts, reset_counts
from fastgan.bench import pairing, plot
from fastgan.bench.cases import CASES

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import goals
import measured_cpu
import readme_table
import winograd_errors

RATES = {"fp32 GFLOP/s": 100.0, "bf16 GFLOP/s": 10.0, "copy GB/s": 10.0}


class TestShownTables:
    @pytest.mark.parametrize("page", readme_table.PAGES, ids=lambda page: page.name)
    def test_pages_show_the_committed_data(self, page):
        text = page.read_text(encoding="utf-8")
        assert readme_table.written(text) == text, "run python benchmarks/readme_table.py"
        assert "<!-- end -->" in text

    @pytest.mark.parametrize("machine", readme_table.MACHINES)
    def test_picture_is_drawn_from_the_committed_data(self, machine):
        assert plot.drawn_from(readme_table.picture(machine)) == plot.digest(readme_table.shown_rows(machine))

    @pytest.mark.parametrize("machine", readme_table.MACHINES)
    def test_an_altered_number_shows(self, machine):
        text = readme_table.PAGES[0].read_text(encoding="utf-8")
        speed = readme_table.speed(machine)
        assert speed in text
        number = re.search(r"\*\*([\d.]+)\*\*", speed)[1]
        assert readme_table.written(text.replace(f"**{number}**", "**9.99**")) == text

    def test_goals_say_what_falls_short(self):
        assert goals.Goal("x", 2.0, 1.996).line() == ["x", "at least 2", "2.00", "-", "**no**"]
        assert goals.Goal("x", 0.5, 0.5, most=True).line()[-1] == "yes"
        operation = {"group": "gan_bce both", "name": "64", "provider": "cpu", "times_reference": [1.5, 1.4, 1.6]}
        bound = operation | {"provider": "no kernel", "times_reference": [1.9, 1.8, 2.0]}
        copying = operation | {"group": "bn_act both", "times_reference": [1.2, 1.1, 1.3], "GB/s": 4.0}
        found = goals.of_operations([operation, bound, copying], RATES)
        assert [(goal.measured, pytest.approx(goal.limit)) for goal in found] == [(1.5, 1.9), (1.2, 3.0), (0.4, 1.0)]
        call = bound | {"group": "bn_act both", "times_reference": [6.0, 5.9, 6.1]}  # a sixth, and a third at a copy's
        assert [goal.limit for goal in goals.of_operations([copying, call], RATES)] == pytest.approx([2.0, 2 / 3])
        layer = {"group": "forward", "seconds": 1.0, "GFLOP/s": 90.0}
        rows = [
            layer | {"name": "DCGAN-64 G2 512-256 to 8x8", "times_reference": [2.0, 2.0, 2.0]},
            layer | {"name": "DCGAN-64 G3 256-128 to 16x16", "times_reference": [1.3, 1.3, 1.3], "seconds": 3.0},
            layer | {"name": "DCGAN-64 G5 64-3 to 64x64", "times_reference": [3.0, 3.0, 3.0]},
            layer | {"name": "DCGAN-64 D1 3-64 to 32x32", "times_reference": [1.2, 1.2, 1.2]},
            layer | {"name": "DCGAN-64 D5 512-1 to 1x1", "times_reference": [1.0, 1.0, 1.0]},
            layer | {"name": "DCGAN-64 G1 100-512 to 4x4", "times_reference": [1.0, 1.0, 1.0]},
        ]
        found = [(goal.what.split(",")[0], goal.measured) for goal in goals.of_layers(rows, RATES)]
        mean, short, thin = found
        assert mean[1] == pytest.approx((2.0 + 3 * 1.3) / 4)
        assert short == ("middle: DCGAN-64 G3 256-128 to 16x16", 1.3)
        assert thin == ("thin: DCGAN-64 G5 64-3 to 64x64", 3.0)  # at D1 the library is fast

    @pytest.mark.parametrize("phase", [1.0, 1.3])
    def test_a_thin_layer_that_falls_short_is_shown_however_fast_the_machine_runs(self, phase):
        """The library at 50 GFLOP/s where the machine's peak is 145."""
        rates = {"GFLOP/s": 85.0 * phase, "times_reference": [1.7, 1.6, 1.8], "seconds": 1.0}
        (goal,) = goals.of_layers(
            [{"group": "weight gradient", "name": "DCGAN-64 G5 64-3 to 64x64", **rates}],
            {"fp32 GFLOP/s": 145.0 * phase},
        )
        assert goal.line()[-1] == "**no**"
        assert goal.limit == pytest.approx(1.7 * 145 / 85)

    @pytest.mark.parametrize("machine", readme_table.MACHINES)
    def test_every_share_is_of_the_peaks_in_the_header(self, machine):
        header, peaks = readme_table.measured_on(machine), readme_table.peaks(machine)
        for name, shown, rate in (("fp32 GFLOP/s", readme_table.layers(machine), 3), ("copy GB/s", "", 0)):
            peak = float(re.search(rf"(\d+) {name}", header)[1])
            assert peak == round(peaks[name])
            for line in shown.splitlines()[2:]:
                cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
                assert int(cells[rate + 1].split()[0]) == pytest.approx(100 * float(cells[rate]) / peak, abs=1)
        moved = [
            100 * row["GB/s"] / peaks["copy GB/s"] for row in readme_table.pairs(machine, "operations") if "GB/s" in row
        ]
        shares = [line.split(" | ")[-1].strip(" |") for line in readme_table.operations(machine).splitlines()[2:]]
        assert [share for share in shares if share != "-"] == [f"{one:.0f} %" for one in moved]

    @pytest.mark.parametrize("machine", readme_table.MACHINES)
    def test_every_committed_row_is_a_case(self, machine):
        assert {row["case"] for row in readme_table.step_rows(machine)} <= {case.name for case in CASES}


class TestMeasuredOnCpu:
    @pytest.fixture(autouse=True)
    def built(self, monkeypatch):
        monkeypatch.delenv("FASTGAN_CPU", raising=False)
        library.load("cpu")

    def test_a_row_names_the_kernels_and_others_are_not_measured(self, monkeypatch, capsys):
        found = [((8, 3, 4, 4), pairing.Interval(1.5, 1.1, 2.0))]
        for kernels in ("avx2", "plain"):
            monkeypatch.setattr(torch.ops.fastgan_cpu, "instruction_set", lambda found=kernels: found)
            assert measured_cpu.row("bn_act", "contiguous", found)["kernels"] == kernels
        monkeypatch.setenv("FASTGAN_CPU", "plain")
        monkeypatch.setattr(sys, "argv", ["measured_cpu.py", "--only", "nothing"])
        monkeypatch.setattr(measured_cpu, "cases", list)  # were it to go on, nothing would be written
        with pytest.raises(SystemExit):
            measured_cpu.main()
        assert "FASTGAN_CPU is set" in capsys.readouterr().err

    def test_a_row_is_of_the_least_batch_from_which_on_all_are_faster(self):
        fast, slow = pairing.Interval(1.5, 1.1, 2.0), pairing.Interval(1.5, 1.0, 2.0)  # 1.0 is not above 1
        shapes = [(n, 3, 4, 4) for n in (8, 32, 64)]

        def found(*intervals):
            return measured_cpu.row("bn_act", "contiguous", list(zip(shapes, intervals, strict=True)))

        assert found(fast, fast, fast)["shape"] == [8, 3, 4, 4]
        assert found(fast, slow, fast._replace(median=1.2))["shape"] == [64, 3, 4, 4]
        assert found(slow, fast, fast._replace(median=1.2))["ratio"] == 1.2
        assert found(fast, fast, slow) is None

    def test_rows_are_replaced_kept_and_dropped_line_by_line(self, tmp_path, monkeypatch):
        """And none of them is lost by a run that ends early."""
        fast, slow = pairing.Interval(1.5, 1.1, 2.0), pairing.Interval(0.9, 0.8, 1.0)
        shapes = {size: [(8, 3, size, size)] for size in (4, 8, 16, 32)}
        ratios = iter([fast, slow, fast])

        def measure(operation, layout, shape, budget):
            if (interval := next(ratios, None)) is None:
                raise KeyboardInterrupt
            return interval

        table = tmp_path / "measured_cpu.json"
        old = [measured_cpu.row("bn_act", "contiguous", [(shapes[size][0], fast)]) for size in (4, 8, 32)]
        elsewhere = {**old[0], "capability": "of another machine"}
        rows = [{**one, "ratio": 9.0} for one in (*old, elsewhere)]
        table.write_text(json.dumps({"about": "x", "rows": rows}))
        monkeypatch.setattr(measured_cpu, "TABLE", table)
        monkeypatch.setattr(measured_cpu, "measure", measure)
        monkeypatch.setattr(measured_cpu, "cases", lambda: [("bn_act", "contiguous", s) for s in shapes.values()])
        monkeypatch.setattr(sys, "argv", ["measured_cpu.py"])
        with pytest.raises(KeyboardInterrupt):
            measured_cpu.main()
        found = json.loads(table.read_text())
        assert found["about"] == "x"
        assert rows[-1] in found["rows"]
        here = [row for row in found["rows"] if row["capability"] != elsewhere["capability"]]
        # 4 replaced, 8 dropped as slower, 16 new, 32 not come to.
        assert {row["shape"][2]: row["ratio"] for row in here} == {4: 1.5, 16: 1.5, 32: 9.0}
        assert list(tmp_path.iterdir()) == [table]

    @pytest.mark.parametrize("operation", ["bn_act", "gan_bce", "adam_ema"])
    def test_both_sides_compute_the_same(self, operation):
        """That like is timed against like. How exact a kernel is, its own tests hold by the one rule."""
        name, layout, shapes = next(case for case in measured_cpu.cases() if case[0] == operation)
        passes = getattr(measured_cpu, f"{name}_passes")(shapes[0], layout)
        reset_counts()
        for eager, kernel in zip(passes["eager"](), passes["kernel"](), strict=True):
            torch.testing.assert_close(kernel, eager, rtol=1e-3, atol=1e-4)
        assert ("cpu", operation) in counts() or ("cpu", f"{operation}_grad") in counts()


class TestErrorsOfWinograd:
    @pytest.mark.parametrize("algorithm", winograd_errors.ALGORITHMS, ids=lambda one: one.name)
    def test_each_algorithm_is_the_convolution(self, algorithm):
        """And not another function: how large its errors are is what the page measures by the one rule."""
        torch.manual_seed(0)
        x, w, g = torch.randn(2, 3, 16, 8), torch.randn(5, 3, 4, 4), torch.randn(2, 5, 8, 4)
        found = winograd_errors.passes(x, w, g, algorithm._replace(operands=torch.float32))
        for name, exact in winograd_errors.own(x.double(), w.double(), g.double()).items():
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-4, atol=1e-4)

    def test_the_page_says_which_forward_passes_the_rule_refuses(self):
        page = winograd_errors.PAGE.read_text(encoding="utf-8").partition("<!-- winograd bf16 -->")[2]
        cells = [line.split(" | ") for line in page.splitlines()[4:10]]
        said = {cell[0].strip("| "): re.sub(r"[\d.]+, [\d.]+", "", cell[2]) for cell in cells}
        found = winograd_errors.measured(64)
        assert said == {name: passes["forward"][2] for name, passes in found.items()}
        assert said["F(2x2, 2x2)"] == winograd_errors.BY_GRANT

    def test_the_points_leave_half_the_error_of_the_usual_ones(self):
        usual, ours = winograd_errors.measured_points(64).values()
        assert ours[0] < 0.6 * usual[0]

    def test_three_times_the_rms_error_is_granted_to_one_algorithm_alone(self):
        truth = torch.linspace(0.5, 1.0, 64, dtype=torch.float64)
        theirs = truth + 0.01
        theirs[0] += 0.01  # their maximum is twice their usual error
        granted, other = (next(a for a in winograd_errors.ALGORITHMS if a.granted == yes) for yes in (True, False))
        assert granted.name == "F(2x2, 2x2)"

        def marks(error):
            return [
                winograd_errors.mark(one, (truth + error).float(), theirs.float(), truth) for one in (granted, other)
            ]

        assert marks(0.019) == ["", ""]
        assert marks(0.025) == [" *granted*", " **no**"]
        assert marks(0.035) == [" **no**", " **no**"]
        spike = torch.full((64,), 0.025)
        spike[0] = 0.045  # 2.25 times their maximum
        assert marks(spike) == [" **no**", " **no**"]
