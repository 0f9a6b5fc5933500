"""`python -m fastgan.sample`: every format, reproducible, and clear errors."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastgan import images
from fastgan.errors import FastganError
from fastgan.sample import Options, draw_latents, load_generator, main, sample, slerp
from fastgan.train import Trainer, preset


@pytest.fixture(scope="module", params=[1, 3, 4])
def run(request, tiny_images, tmp_path_factory):
    """A finished run with 1, 3 or 4 channels."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = preset(
        "digits",
        data=str(tiny_images),
        cache=tiny_images.parent / "cache",
        out=out,
        image_size=16,
        channels=request.param,
        batch_size=8,
        kimg=0.08,
        latent_dim=6,
        g_channels=4,
        d_channels=4,
        device="cpu",
    )
    Trainer(config, Console(file=io.StringIO())).run()
    return out, request.param


def test_grid(run, tmp_path):
    folder, channels = run
    out = sample(Options(folder, tmp_path / "grid.png", n=6, columns=3))
    with Image.open(out) as picture:
        assert picture.size == (3 * 16 + 2 * 2, 2 * 16 + 2)
        assert picture.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


def test_the_grid_shows_the_array(run, tmp_path):
    folder, channels = run
    array = np.load(sample(Options(folder, tmp_path / "all.npy", n=5, batch_size=2)))
    assert array.shape == (5, 16, 16, channels)
    assert array.dtype == np.uint8
    with Image.open(sample(Options(folder, tmp_path / "one" / "grid.png", n=5, columns=5))) as picture:
        grid = np.asarray(picture).reshape(16, -1, channels)
    for index in range(5):
        assert np.array_equal(grid[:, index * 18 : index * 18 + 16], array[index])
    singles = sample(Options(folder, tmp_path / "singles", n=5))
    assert sorted(path.name for path in singles.iterdir()) == [f"{index:05d}.png" for index in range(5)]
    with Image.open(singles / "00003.png") as picture:
        assert np.array_equal(np.asarray(picture).reshape(16, 16, channels), array[3])


def test_gif_returns_to_its_start(run, tmp_path):
    out = sample(Options(run[0], tmp_path / "film.gif", n=4, frames=8, fps=10))
    with Image.open(out) as film:
        assert film.n_frames == 8
        assert film.info["duration"] == 100
        assert film.info["loop"] == 0


def test_mp4(run, tmp_path):
    imageio = pytest.importorskip("imageio.v2", reason="films need the extra `video`")
    out = sample(Options(run[0], tmp_path / "film.mp4", n=1, frames=6, fps=6))
    frames = imageio.mimread(out)
    assert len(frames) == 6
    assert frames[0].shape == (16, 16, 3)


def test_a_missing_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(FastganError, match=r"pip install 'fastgan\[video\]'"):
        sample(Options(run[0], tmp_path / "film.mp4", n=1, frames=2))
    assert list(tmp_path.iterdir()) == []


def test_seed_and_weights(run, tmp_path):
    def array(**options):
        return np.load(sample(Options(run[0], tmp_path / "x.npy", n=3, **options)))

    assert np.array_equal(array(), array())
    assert not np.array_equal(array(), array(seed=1))
    last, average = load_generator(run[0], weights="generator"), load_generator(run[0])
    assert not torch.equal(last.main[0].weight, average.main[0].weight)


def test_loaded_generator_is_ready_to_use(run):
    generator = load_generator(run[0])
    assert not generator.training
    assert not any(p.requires_grad for p in generator.parameters())
    assert generator(torch.zeros(2, generator.latent_dim)).shape == (2, run[1], 16, 16)


def test_the_first_latents_do_not_depend_on_how_many_are_drawn():
    assert torch.equal(draw_latents(3, 7, 0), draw_latents(9, 7, 0)[:3])


def test_truncation_bounds_latents_and_keeps_those_inside():
    plain, cut = draw_latents(200, 50, 0), draw_latents(200, 50, 0, truncation=0.7)
    assert plain.abs().max() > 2
    assert cut.abs().max() <= 0.7
    assert torch.equal(cut[0][plain[0].abs() <= 0.7], plain[0][plain[0].abs() <= 0.7])
    assert cut.std() == pytest.approx(0.38, abs=0.02)  # of a normal cut at 0.7


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draw_latents(4, 4, 1, truncation=1.0)
    assert torch.equal(torch.rand(1), expected)


def test_slerp_keeps_the_norm_and_meets_its_ends():
    start, end = torch.nn.functional.normalize(torch.randn(2, 5, 64), dim=2)
    torch.testing.assert_close(slerp(start, end, 0.0), start)
    torch.testing.assert_close(slerp(start, end, 1.0), end)
    torch.testing.assert_close(slerp(start, end, 0.3).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(slerp(start, start, 0.5), start)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_of_a_ragged_last_row(channels):
    tiles = np.full((5, 2, 2, channels), 9, np.uint8)
    grid = images.grid(tiles, columns=3, gap=1)
    assert grid.shape == (5, 8, channels)
    assert (grid[3:, :2] == 9).all()
    assert not grid[3:, 6:, :3].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--n", "0"], "--n: expected at least 1, got 0"),
        (["--truncation", "0"], "--truncation: expected at least 0.01, got 0"),
        (["--out", "x.jpg"], "expected a folder or .png, .npy, .gif, .mp4; got x.jpg"),
        (["--out", ".", "--format", "npy"], "--format npy writes one file; . is a folder"),
        (["--device", "tpu"], "expected auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--seed", "-1"], "--seed: expected 0 to"),
    ],
)
def test_errors(run, given, message, capsys):
    assert main([str(run[0]), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_no_run(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such run folder or checkpoint" in capsys.readouterr().err


def test_unknown_format_lists_the_known(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--format", "bmp"])
    assert stop.value.code == 2
    assert "'gif'" in capsys.readouterr().err
