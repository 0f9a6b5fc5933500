"""Training with two processes is training with one: the same weights, the same files, the same bits after resuming."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_resume import assert_same_run, stop_after, wait_for_checkpoint

from fastgan import library
from fastgan.errors import CheckpointError, FastganError
from fastgan.train import Trainer, checkpoint
from fastgan.train.config import TrainConfig, parse
from fastgan.train.log import read_log

HARD = {"r1": 1.0, "penalty_interval": 3, "flip": True, "wgan_gp": 0.1, "lr_decay": "cosine", "clip_grad": 1.0}


@pytest.fixture(scope="module", autouse=True)
def built():
    """Once and here: two processes would wait for one another's compiler."""
    library.load("cpu")


def train(config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """This process's final weights and random states, and what it printed."""
    out = io.StringIO()
    trainer = Trainer(config, Console(file=out, width=200))
    trainer.run()
    networks = {"g": trainer.generator, "d": trainer.discriminator, "ema": trainer.ema.module}
    state = {f"{n}.{k}": v.clone() for n, net in networks.items() for k, v in net.state_dict().items()}
    return {**state, "random": torch.get_rng_state()}, out.getvalue().splitlines()


def run_files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [{}, HARD], ids=["plain", "hard"])
def test_two_processes_are_one(pair, tiny, options):
    """8 images a step on one process, 4 and 4 on two; 60 images are no multiple of 8."""
    (one, printed), (two, silence) = pair(train, tiny(out="two", kimg=0.08, **options))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert silence == []
    assert any("on 2 processes" in line for line in printed)
    alone = tiny(out="alone", kimg=0.08, **options)
    expected, _ = train(alone)
    assert torch.equal(one.pop("random"), expected.pop("random"))
    # Adam divides by the gradient's size: a tenth of a step (0.004 and 0.008) is rounding's share after ten of them.
    for name, value in one.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=4e-4, msg=lambda text, name=name: name + text)
    for got, want in zip(read_log(alone.out.parent / "two"), read_log(alone.out), strict=True):
        assert got.keys() == want.keys()
        assert got["loss_d"] == pytest.approx(want["loss_d"], rel=1e-3)
        assert got["kimg"] == want["kimg"]
    assert run_files(alone.out.parent / "two") == run_files(alone.out)


def interrupted(config: TrainConfig, steps: int) -> None:
    """Train until the power fails after `steps` steps."""
    trainer = Trainer(config, Console(file=io.StringIO()))
    trainer.step.opt_d.register_step_pre_hook(stop_after(trainer, steps))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer.run()


def resumed(run: Path) -> None:
    train(parse(["--resume", str(run)]))


def test_resumed_bit_for_bit_in_the_middle_of_an_epoch(pair, tiny):
    """Checkpoints after 5 and 10 steps, an epoch of 7, the end after 12."""
    whole, parts = tiny(out="whole", kimg=0.12, **HARD), tiny(out="parts", kimg=0.12, **HARD)
    pair(train, whole)
    pair(interrupted, parts, 11)
    pair(resumed, parts.out)
    assert_same_run(whole.out, parts.out)


def refused(config: TrainConfig) -> str:
    try:
        Trainer(config, Console(file=io.StringIO()))
    except FastganError as error:
        return str(error)
    return "nothing"


def test_another_number_of_processes_is_refused(pair, tiny):
    config = tiny(kimg=0.04)
    pair(train, config)
    with pytest.raises(CheckpointError, match=r"trained by 2 processes, and 1 cannot .* torchrun --nproc-per-node 2"):
        Trainer(parse(["--resume", str(config.out)]), Console(file=io.StringIO()))
    alone = tiny(out="alone", kimg=0.04)
    train(alone)
    for message in pair(refused, parse(["--resume", str(alone.out)])):
        assert "trained by 1 process, and 2 cannot" in message


def test_a_batch_that_cannot_be_shared_is_refused(pair, tiny):
    config = tiny(batch_size=9)
    for message in pair(refused, config):
        assert "--batch-size: 9 images cannot be shared equally by 2 processes; take 10" in message
    assert not config.out.exists()


def launch(*arguments: str, **options) -> subprocess.Popen:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastgan.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command, *arguments], env=environment, **pipes, **options)


def test_torchrun_ctrl_c_and_resume(arguments, tmp_path):
    """Ctrl-C reaches torchrun, which hands it to both: they stop after the same step, once it is saved."""
    run = tmp_path / "run"
    process = launch(*arguments(kimg=10_000.0))
    wait_for_checkpoint(run, process, after=0)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert error.count("stopped by SIGINT; saved") == 1, error
    assert out.count("on 2 processes") == 1, out
    steps = checkpoint.read_header(run)["steps"]
    assert read_log(run)[-1]["step"] == steps
    end = launch("--resume", str(run), "--kimg", str((steps * 8 + 16) / 1000))
    out, error = end.communicate(timeout=120)
    assert end.returncode == 0, error
    assert checkpoint.read_header(run)["steps"] == steps + 2
    assert checkpoint.read_header(run)["processes"] == 2


def test_an_error_is_said_once(tmp_path):
    process = launch("--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"), "--device", "cpu")
    _, error = process.communicate(timeout=120)
    assert error.count("error: ") == 1, error
    assert "nowhere" in error
    assert "exitcode  : 2" in error  # what torchrun tells of the first process that failed
    assert not (tmp_path / "run").exists()
