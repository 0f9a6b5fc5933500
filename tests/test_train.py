"""A whole run through the Python API and the command: what it leaves behind, what it refuses."""

import io
import json
import math
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastgan.devices import choose_device, choose_precision
from fastgan.errors import FastganError, Interrupted
from fastgan.train import TrainConfig, Trainer, preset
from fastgan.train.__main__ import main
from fastgan.train.config import PRESETS, parse
from fastgan.train.log import read_log
from fastgan.train.loop import Diverged
from fastgan.train.progress import Progress, duration


@pytest.fixture(scope="module")
def finished(tiny_images, tmp_path_factory):
    """A finished run and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "squares"
    printed = io.StringIO()
    config = preset(
        "digits",
        data=str(tiny_images),
        out=out,
        cache=tiny_images.parent / "cache",
        image_size=16,
        batch_size=8,
        kimg=0.2,
        latent_dim=6,
        g_channels=4,
        d_channels=4,
        report_kimg=0.04,
        sample_kimg=0.08,
        checkpoint_kimg=0.08,
        device="cpu",
    )
    Trainer(config, Console(file=printed, width=200)).run()
    return out, printed.getvalue()


def test_run_folder_holds_config_log_samples_checkpoints_and_report(finished):
    run, _ = finished
    assert TrainConfig.from_json(json.loads((run / "config.json").read_text()), "config.json").kimg == 0.2
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-000000020.safetensors",
        "step-000000025.safetensors",
    ]
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        f"kimg-{kimg:09.3f}.png" for kimg in (0, 0.08, 0.16, 0.2)
    ]
    with Image.open(run / "samples" / "kimg-00000.200.png") as grid:
        assert grid.size == (8 * 16 + 7 * 2, 8 * 16 + 7 * 2)
        assert grid.mode == "L"
        assert len(np.unique(np.asarray(grid))) > 5
    assert not list(run.rglob("*.writing*"))


def test_log_has_a_line_for_each_report_with_units_in_its_keys(finished):
    entries = read_log(finished[0])
    assert [entry["step"] for entry in entries] == [5, 10, 15, 20, 25]
    for entry in entries:
        assert {"kimg", "seconds", "images_per_second", "loss_g", "loss_d", "d_real", "d_fake", "lr_g"} <= set(entry)
        assert all(math.isfinite(value) for value in entry.values())
        assert 0 < entry["d_real"] < 1


def test_plain_lines_where_output_is_no_terminal(finished):
    lines = [line for line in finished[1].splitlines() if line.startswith("step")]
    assert len(lines) == 5
    assert re.search(
        r"kimg 0.2/0.2  \d+ images/s  loss G [\d.]+ D [\d.]+  D\(x\) [\d.]+  D\(G\(z\)\) [\d.]+  0s left", lines[-1]
    )
    assert "device     cpu (" in finished[1]
    assert "float32" in finished[1]


def test_one_live_line_on_a_terminal():
    out = io.StringIO()
    report = {"step": 1, "kimg": 1.0, "images_per_second": 10.0, "loss_d": 1.0, "d_real": 0.5, "d_fake": 0.5}
    with Progress(Console(file=out, force_terminal=True, width=200), 2.0) as progress:
        progress.show(report)
        progress._live.refresh()
        progress.show({**report, "step": 2})
    assert "\x1b[2K" in out.getvalue()  # the line is erased and written again
    assert "1m40s left" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (187, "3m07s"), (8100, "2h15m")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_report_is_one_page_without_outside_references(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<svg" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for text in ("main.0", "bn_act", "g_channels", torch.__version__):
        assert text in page


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(tiny):
    weights = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = Trainer(tiny(out=out, seed=seed, kimg=0.04), Console(file=io.StringIO()))
        trainer.run()
        weights.append(trainer.generator.main[0].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_option_reaches_training(tiny):
    config = tiny(
        loss="relativistic_paired", label_smoothing=0.1, r1=1.0, r2=1.0, penalty_interval=2, d_steps=2, clip_grad=1.0,
        optimizer="adamw", weight_decay=0.01, warmup_kimg=0.05, lr_decay="cosine", spectral_norm=True, precision="bf16",
        flip=True, wgan_gp=1.0,
    )  # fmt: skip
    trainer = Trainer(config, Console(file=io.StringIO()))
    assert trainer.step.real_target == pytest.approx(0.9)
    assert trainer.step.autocast == torch.bfloat16
    trainer.run()
    entry = read_log(trainer.run_folder)[-1]
    assert {"r1", "r2", "wgan_gp"} <= set(entry)
    assert entry["lr_g"] < 0.2 * config.lr_g  # near the end of the cosine
    assert (trainer.opt_g.param_groups[0]["betas"], trainer.step.generator_interval) == ((0.5, config.beta2), 2)


def test_sgd_trains(tiny):
    trainer = Trainer(tiny(optimizer="sgd", kimg=0.04), Console(file=io.StringIO()))
    trainer.run()
    assert trainer.opt_g.param_groups[0]["momentum"] == 0.5


def test_nan_stops_with_step_tensor_and_last_good_checkpoint(tiny):
    trainer = Trainer(tiny(kimg=1.0), Console(file=io.StringIO()))
    original = trainer.step.discriminator.forward

    def poisoned(images):
        return original(images) * (float("nan") if trainer.step.steps == 12 else 1.0)  # throughout step 13

    trainer.discriminator.forward = poisoned
    with pytest.raises(Diverged, match=r"step 13: d_fake is nan.*step-000000010\.safetensors"):
        trainer.run()
    checkpoints = sorted(path.name for path in (trainer.run_folder / "checkpoints").iterdir())
    assert checkpoints == ["step-000000005.safetensors", "step-000000010.safetensors"]


def test_a_bad_gradient_just_before_a_checkpoint_is_not_saved(tiny):
    """Metrics are those before the update, so only the weights themselves can show it."""
    trainer = Trainer(tiny(kimg=1.0), Console(file=io.StringIO()))

    def poison(*_):
        if trainer.step.steps == 9:  # of step 10, after which a checkpoint is due
            trainer.generator.main[0].weight.grad.fill_(float("nan"))

    trainer.step.opt_g.register_step_pre_hook(poison)
    with pytest.raises(Diverged, match=r"after step 10: generator.main.0.weight is not finite.*step-000000005"):
        trainer.run()


def test_two_processes_cannot_train_in_one_folder(tiny):
    trainer = Trainer(tiny(), Console(file=io.StringIO()))
    trainer._save()
    with pytest.raises(FastganError, match="another process is training in this folder"):
        Trainer(tiny(resume=trainer.run_folder), Console(file=io.StringIO()))
    trainer.run()
    Trainer(tiny(resume=trainer.run_folder), Console(file=io.StringIO()))


def test_a_run_stopped_before_its_first_checkpoint_can_begin_again(tiny):
    folder = tiny().out
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{")
    Trainer(tiny(kimg=0.04), Console(file=io.StringIO())).run()


def test_names_with_brackets_are_printed_as_they_are(tiny):
    printed = io.StringIO()
    Trainer(tiny(out="run[old]/x[/b]", kimg=0.04), Console(file=printed, markup=False, width=300)).run()
    assert "run[old]/x[/b]" in printed.getvalue()


def test_dry_run_goes_through_everything_and_leaves_nothing(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(), "--dry-run"]) == 0
    assert "all work" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


def test_runs_are_numbered(tiny_images, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = arguments(kimg=0.016)
    given[given.index("--out") : given.index("--out") + 2] = []
    assert main(given) == 0
    assert main(given) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["00001-squares-16", "00002-squares-16"]


def test_tensorboard_events(tiny):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an optional extra"
    )
    trainer = Trainer(tiny(tensorboard=True, kimg=0.08), Console(file=io.StringIO()))
    run = trainer.run()
    events = accumulator.EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("loss_g")] == [5, 10]


def test_sigterm_saves_first(tiny):
    trainer = Trainer(tiny(kimg=1000.0, checkpoint_kimg=1000.0), Console(file=io.StringIO()))
    trainer.step.opt_d.register_step_pre_hook(
        lambda *_: signal.raise_signal(signal.SIGTERM) if trainer.step.steps == 7 else None
    )
    with pytest.raises(Interrupted) as stop:
        trainer.run()
    assert stop.value.exit_code == 143
    steps = int(sorted((trainer.run_folder / "checkpoints").iterdir())[-1].stem.split("-")[1])
    assert steps == trainer.step.steps == 8
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class TestConfig:
    def test_json_round_trip(self, tiny):
        config = tiny()
        assert TrainConfig.from_json(json.loads(json.dumps(config.to_json())), "x") == config

    def test_unknown_setting_of_another_version(self):
        with pytest.raises(FastganError, match=r"config.json: unknown settings colour"):
            TrainConfig.from_json({"colour": 1}, "config.json")

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_are_valid(self, name):
        preset(name).check()

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ([], ("digits", 32)),
            (["--data", "photos"], ("64", 64)),
            (["--data", "photos", "--image-size", "128"], ("128", 128)),
            (["--data", "photos", "--image-size", "512"], ("256", 512)),
            (["--data", "photos", "--image-size=16"], ("32", 16)),
            (["--preset", "256"], ("256", 256)),
            (["--preset", "digits", "--data", "photos"], ("digits", 32)),
        ],
    )
    def test_preset_follows_data_and_size(self, given, expected):
        config = parse(given)
        assert (config.preset, config.image_size) == expected

    def test_an_option_beats_the_preset(self):
        assert parse(["--preset", "64", "--lr-g", "0.5"]).lr_g == 0.5

    def test_help_shows_the_presets_defaults(self, capsys):
        with pytest.raises(SystemExit) as stop:
            parse(["--preset", "256", "--help"])
        assert stop.value.code == 0
        text = re.sub(r"\s+", " ", capsys.readouterr().out)
        for option in TrainConfig.__dataclass_fields__:
            assert f"--{option.replace('_', '-')}" in text
        assert "(default: 10000.0)" in text

    @pytest.mark.parametrize("given", [["--image-size"], ["--image-size", "abc"], ["--resume"], ["--preset"]])
    def test_usage_errors_name_the_option(self, given, capsys):
        with pytest.raises(SystemExit) as stop:
            parse(given)
        assert stop.value.code == 2
        assert given[0] in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"beta1": 1.0}, "--beta1: expected a value in"),
            ({"r1": math.inf}, "--r1: expected a value at least 0; got inf"),
            ({"image_size": 48}, "--image-size: expected a power of two .*got 48"),
            ({"batch_size": 1}, "--batch-size: expected a value at least 2; got 1"),
            ({"loss": "hing"}, "--loss: expected one of non_saturating.*got 'hing'"),
            ({"label_smoothing": 0.7}, r"--label-smoothing: expected a value in \[0, 0.5\]; got 0.7"),
            ({"lr_g": 0.0}, "--lr-g: expected a finite value above 0"),
            ({"lr_d": math.nan}, "--lr-d: expected a finite value above 0"),
            ({"kimg": math.inf}, "--kimg: expected a finite value above 0"),
            ({"channels": 2}, "--channels: expected one of 1, 3, 4; got 2"),
            ({"r1": -1.0}, "--r1: expected a value at least 0; got -1"),
        ],
    )
    def test_bad_values(self, changes, message):
        with pytest.raises(FastganError, match=message):
            preset("digits", **changes).check()


class TestDevice:
    def test_auto_is_the_cpu_without_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(FastganError, match=r"cuda was asked for, but torch .* finds no CUDA device"):
            choose_device("cuda")

    @pytest.mark.parametrize("name", ["gpu", "mps", "tpu:0"])
    def test_unknown_devices(self, name):
        with pytest.raises(FastganError, match="expected auto, cpu, cuda"):
            choose_device(name)

    def test_precision(self):
        cpu = torch.device("cpu")
        assert choose_precision("auto", cpu) == torch.float32
        assert choose_precision("bf16", cpu) == torch.bfloat16
        with pytest.raises(FastganError, match="fp16 is for CUDA"):
            choose_precision("fp16", cpu)
