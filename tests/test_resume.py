"""A run that was stopped, by whatever means, goes on bit for bit as if it had not been."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fastgan.errors import CheckpointError, FastganError
from fastgan.train import Trainer, checkpoint
from fastgan.train.__main__ import main
from fastgan.train.config import parse
from fastgan.train.log import read_log


def train(config):
    trainer = Trainer(config, Console(file=io.StringIO()))
    trainer.run()
    return trainer.run_folder


def final_state(run):
    tensors, header = checkpoint.read(run)
    return tensors, {key: header[key] for key in ("steps", "images", "batches", "random", "opt_g", "opt_d")}


def assert_same_run(one, other):
    """Equal final checkpoints, to the bit, and equal logs but for the times."""
    (tensors, header), (other_tensors, other_header) = final_state(one), final_state(other)
    assert header == other_header
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []
    timeless = [
        [{k: v for k, v in entry.items() if k not in ("seconds", "images_per_second")} for entry in read_log(run)]
        for run in (one, other)
    ]
    assert timeless[0] == timeless[1]


HARD = {"r1": 1.0, "penalty_interval": 3, "flip": True, "lr_decay": "cosine", "wgan_gp": 0.1}


@pytest.mark.parametrize(
    "options", [{}, HARD, {"optimizer": "sgd", "spectral_norm": True}], ids=["plain", "hard", "sgd"]
)
def test_in_the_middle_of_an_epoch(tiny, options):
    """60 images in batches of 8 are 7 steps an epoch; the first part ends after 10."""
    whole = train(tiny(out="whole", **options))
    parts = tiny(out="parts", **options)
    trainer = Trainer(parts, Console(file=io.StringIO()))
    trainer.step.opt_d.register_step_pre_hook(stop_after(trainer, 10))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer.run()
    resumed = parse(["--resume", str(parts.out)])
    assert train(resumed) == parts.out
    assert_same_run(whole, parts.out)


def stop_after(trainer, steps):
    def hook(*_):
        if trainer.step.steps >= steps:
            raise RuntimeError("pulled the plug")

    return hook


def test_every_global_random_state_goes_on(tiny):
    """A network or a hook of the user's may draw from any of them."""

    def draws(trainer):
        drawn = {}

        def draw(*_):
            numbers = (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002 - the global state
            drawn[trainer.step.steps] = numbers

        trainer.step.opt_d.register_step_pre_hook(draw)
        trainer.run()
        return drawn

    whole = draws(Trainer(tiny(out="whole", kimg=0.12), Console(file=io.StringIO())))
    config = tiny(out="parts", kimg=0.08)
    first = draws(Trainer(config, Console(file=io.StringIO())))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    resumed = parse(["--resume", str(config.out), "--kimg", "0.12"])
    assert {**first, **draws(Trainer(resumed, Console(file=io.StringIO())))} == whole


def test_log_lines_after_the_checkpoint_are_dropped(tiny):
    config = tiny(kimg=0.08)
    run = train(config)
    with open(run / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 99, "kimg": 9.9}) + '\n{"step": 100, "ki')
    train(parse(["--resume", str(run), "--kimg", "0.12"]))
    assert [entry["step"] for entry in read_log(run)] == [5, 10, 15]


def test_an_earlier_checkpoint_can_be_named(tiny):
    run = train(tiny())
    first, last = checkpoint.saved(run)
    trainer = Trainer(parse(["--resume", str(first)]), Console(file=io.StringIO()))
    assert trainer.run_folder == run
    assert trainer.step.steps < int(last.stem.split("-")[1])


def test_only_lengths_and_places_may_change(tiny, tmp_path):
    run = train(tiny(kimg=0.04))
    assert parse(["--resume", str(run), "--kimg", "7", "--report-kimg", "2"]).kimg == 7
    with pytest.raises(FastganError, match="--batch-size is 8 in the saved run and cannot become 16"):
        Trainer(parse(["--resume", str(run), "--batch-size", "16"]))
    with pytest.raises(FastganError, match="--loss is non_saturating in the saved run and cannot become hinge"):
        Trainer(tiny(resume=run, loss="hinge"))


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tiny):
    run = train(tiny())
    first, last = checkpoint.saved(run)
    train(parse(["--resume", str(first), "--kimg", "0.152"]))
    assert [path.name for path in checkpoint.saved(run)] == [first.name, "step-000000019.safetensors"]
    assert last.with_name(last.name + ".superseded").exists()
    assert read_log(run)[-1]["step"] == 19


def test_moved_data_are_the_same_data(tiny, tiny_images, tmp_path):
    run = train(tiny(kimg=0.04))
    moved = tmp_path / "moved.npy"
    moved.write_bytes(tiny_images.read_bytes())
    train(parse(["--resume", str(run), "--kimg", "0.08", "--data", str(moved)]))


def test_a_checkpoint_outside_a_run_folder_is_not_trained_in(tiny, tmp_path, capsys):
    stray = tmp_path / "mine" / "best.safetensors"
    stray.parent.mkdir()
    stray.write_bytes(checkpoint.saved(train(tiny(kimg=0.04)))[-1].read_bytes())
    assert "lies in no run folder" in resume_error(stray, capsys)
    assert [path.name for path in stray.parent.iterdir()] == ["best.safetensors"]


def test_other_images_are_noticed(tiny, tiny_images):
    own = tiny_images.parent / "changing.npy"
    own.write_bytes(tiny_images.read_bytes())
    run = train(tiny(data=str(own), kimg=0.04))
    np.save(own, 255 - np.load(own))
    os.utime(own, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was trained on other images"):
        Trainer(parse(["--resume", str(run)]), Console(file=io.StringIO()))


@pytest.fixture
def run_folder(tiny):
    return train(tiny(kimg=0.08))


def resume_error(path, capsys):
    assert main(["--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    return error


def test_a_checkpoint_cut_short_is_named_with_the_one_before(run_folder, capsys):
    older, newest = checkpoint.saved(run_folder)
    newest.write_bytes(newest.read_bytes()[:-100])
    error = resume_error(run_folder, capsys)
    assert str(newest) in error
    assert "cut short" in error
    assert f"use {older}" in error
    assert main(["--resume", str(older)]) == 0


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not a checkpoint at all, but a longer text of some kind"])
def test_a_file_that_is_no_checkpoint(run_folder, capsys, content):
    newest = checkpoint.saved(run_folder)[-1]
    newest.write_bytes(content)
    assert "damaged or cut short" in resume_error(newest, capsys)


def test_a_safetensors_file_of_something_else(tmp_path, capsys):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "not a checkpoint of fastgan" in resume_error(tmp_path / "other.safetensors", capsys)


def rewrite(path, change):
    tensors, header = checkpoint.read(path)
    change(tensors, header)
    save_file(tensors, path, {"fastgan": json.dumps(header)})


def test_a_newer_format(run_folder, capsys):
    newest = checkpoint.saved(run_folder)[-1]
    rewrite(newest, lambda tensors, header: header.update(format=99))
    assert "format 99" in (error := resume_error(run_folder, capsys))
    assert "upgrade fastgan" in error


def test_another_architecture(run_folder, capsys):
    newest = checkpoint.saved(run_folder)[-1]
    rewrite(newest, lambda tensors, header: header["config"].update(g_channels=8))
    error = resume_error(run_folder, capsys)
    assert "another architecture: generator.main" in error
    assert "the configured network has" in error


def test_a_missing_tensor(run_folder, capsys):
    newest = checkpoint.saved(run_folder)[-1]
    rewrite(newest, lambda tensors, header: tensors.pop("ema.main.0.weight"))
    assert "ema.main.0.weight is no such tensor" in resume_error(run_folder, capsys)


def test_nothing_there(tmp_path, capsys):
    assert "no such run folder" in resume_error(tmp_path / "nowhere", capsys)
    assert "holds no checkpoint" in resume_error(tmp_path, capsys)


def test_pickles_are_not_opened(tmp_path, capsys):
    torch.save({"generator": torch.zeros(1)}, tmp_path / "model.pt")
    assert "damaged or cut short" in resume_error(tmp_path / "model.pt", capsys)


def test_a_full_disk_keeps_the_checkpoints_that_are_there(run_folder, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in checkpoint.saved(run_folder)}

    def full(handle):
        raise OSError(28, "No space left on device")  # as the system raises it: without a name

    monkeypatch.setattr(os, "fsync", full)
    assert main(["--resume", str(run_folder), "--kimg", "0.2"]) == 2
    assert "checkpoints/step-000000015.safetensors: No space left on device; free some space" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (run_folder / "checkpoints").iterdir()} == before


def test_ctrl_c_saves_and_exits_130(arguments, tmp_path):
    process = start(arguments(kimg=10_000.0))
    wait_for_checkpoint(tmp_path / "run", process, after=0)  # by then it listens to signals
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, (out, error)
    assert "stopped by SIGINT; saved" in error
    assert "--resume" in error
    last_logged = read_log(tmp_path / "run")[-1]["step"]
    assert checkpoint.read_header(tmp_path / "run")["steps"] == last_logged
    assert main(["--resume", str(tmp_path / "run"), "--kimg", str(last_logged * 8 / 1000 + 0.01)]) == 0


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastgan.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background ignores Ctrl-C, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_checkpoint(run, process, after=-1):
    """Wait for a checkpoint of a later step than `after`."""
    deadline = time.monotonic() + 240
    while not any(int(path.stem.split("-")[1]) > after for path in checkpoint.saved(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_and_resume(arguments, tmp_path, kills, seed, kimg):
    """Kill a run at random moments until it has been killed `kills` times, then let it end."""
    moments = random.Random(seed)
    whole = start([*arguments(out="whole", kimg=kimg)])
    assert whole.wait(timeout=600) == 0, whole.communicate()
    run = tmp_path / "broken"
    command = arguments(out="broken", kimg=kimg)
    for life in range(kills):
        process = start(command)
        if life % 3 == 1:  # while it starts: resuming, rewriting the log, before its first save
            time.sleep(moments.uniform(0, 4))
        else:  # while it trains and saves
            done = max((int(path.stem.split("-")[1]) for path in checkpoint.saved(run)), default=0)
            wait_for_checkpoint(run, process, after=done)
            time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before the kill: too few steps for so many kills"
        if checkpoint.saved(run):
            command = ["--resume", str(run)]
    end = start(["--resume", str(run)])
    assert end.wait(timeout=600) == 0, end.communicate()
    assert_same_run(tmp_path / "whole", run)


def test_two_kills(arguments, tmp_path):
    kill_and_resume(arguments, tmp_path, kills=2, seed=0, kimg=1.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(arguments, tmp_path):
    kill_and_resume(arguments, tmp_path, kills=20, seed=1, kimg=10.0)


def test_the_comparison_itself_sees_one_changed_bit(tiny):
    one, other = train(tiny(out="one", kimg=0.04)), train(tiny(out="other", kimg=0.04))
    assert_same_run(one, other)
    path = checkpoint.saved(other)[-1]
    name = "ema.main.0.weight"

    def flip(tensors, header):
        tensors[name].view(torch.int32).view(-1)[0] ^= 1

    rewrite(path, flip)
    assert not torch.equal(load_file(path)[name], load_file(checkpoint.saved(one)[-1])[name])
    with pytest.raises(AssertionError, match=name):
        assert_same_run(one, other)
