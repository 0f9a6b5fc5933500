"""What `python -m fastgan.train` without options promises: digits that a person recognises."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digit_classifier import Judgement, judge, to_float, train_digit_classifier
from torch import Tensor

from fastgan.data import prepare
from fastgan.sample import draw_latents, load_generator
from fastgan.train import Trainer, preset

MIN_ACCURACY = 0.98  # of the judge, on real digits that it has not seen
MIN_SHARE = 0.03
MIN_CONFIDENCE = 0.90


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """The bundled digits, uint8 [10000, 1, 32, 32], and their classes."""
    prepared = prepare("digits", 32, cache_dir=tmp_path_factory.mktemp("cache"))
    return torch.from_numpy(prepared.images.copy()).permute(0, 3, 1, 2), torch.from_numpy(prepared.labels.copy())


@pytest.fixture(scope="module")
def judging(digits):
    classifier, accuracy = train_digit_classifier(*digits)
    assert accuracy >= MIN_ACCURACY
    return lambda samples: judge(classifier, samples)


def recognisable(judgement: Judgement) -> bool:
    return bool(judgement.shares.min() >= MIN_SHARE) and judgement.confidence >= MIN_CONFIDENCE


def samples_of(run: Path, n: int) -> Tensor:
    generator = load_generator(run)
    return generator(draw_latents(n, generator.latent_dim, seed=1))


@pytest.mark.slow
def test_default_run_draws_all_ten_digits(judging, tmp_path):
    run = tmp_path / "run"
    subprocess.run([sys.executable, "-m", "fastgan.train", "--out", run], check=True)
    judgement = judging(samples_of(run, 1000))
    assert recognisable(judgement), judgement


@pytest.mark.slow
def test_judge_accepts_real_digits_and_rejects_others(judging, digits):
    """The judgement of the default run can fail: for a generator that forgot a class, and for one that blurs."""
    images, labels = digits
    real = to_float(images[9::10])
    assert recognisable(judging(real))
    without_sevens = to_float(images[labels != 7][:1000])
    assert not recognisable(judging(without_sevens))
    blends = (to_float(images[:1000]) + to_float(images[1000:2000])) / 2
    assert not recognisable(judging(blends))
    assert not recognisable(judging(real[:1].expand(1000, -1, -1, -1)))


def test_first_seconds_of_the_default_run_learn_where_ink_is(digits, tmp_path):
    """A small share of the default run, judged without a classifier: the mean image of the samples nears the real
    one. Untrained, or with a wrong sign in a loss, it does not."""
    images, _ = digits
    real = to_float(images).mean(0).flatten()

    def likeness(run: Path) -> float:
        return torch.corrcoef(torch.stack([real, samples_of(run, 200).mean(0).flatten()]))[0, 1].item()

    trainer = Trainer(preset("digits", out=tmp_path / "run", kimg=8.0, cache=tmp_path / "cache"))
    checkpoints = trainer.run_folder / "checkpoints"
    trainer.run()
    first, *_, last = sorted(checkpoints.iterdir())
    assert abs(likeness(first)) < 0.5
    assert likeness(last) > 0.8
