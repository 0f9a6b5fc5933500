"""Bad input to `python -m fastgan.train`: exit code 2, one clear line that names it, nothing lost, no traceback."""

import errno
import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastgan.command import run_command
from fastgan.errors import FastganError
from fastgan.train.__main__ import main


def picture(mode="RGB", size=(20, 24), kind="PNG"):
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def error_of(arguments, tmp_path, capsys):
    """What the command prints for an option, after checking that it exits as promised and leaves nothing behind."""

    def run(*given, **changes):
        before = set(tmp_path.rglob("*"))
        assert main([*arguments(**changes), *map(str, given)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error.strip().splitlines()) == 1
        assert "Traceback" not in error
        assert set(tmp_path.rglob("*")) == before
        return error

    return run


def test_empty_folder(error_of, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty is empty; expected images" in error_of("--data", tmp_path / "empty")


def test_no_such_folder(error_of, tmp_path):
    assert f"there is no {tmp_path / 'nowhere'}" in error_of("--data", tmp_path / "nowhere")


def test_a_text_file_called_png_is_named(error_of, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "note.png").write_text("milk, bread")
    assert "note.png" in error_of("--data", tmp_path / "photos")


def test_a_truncated_file_among_good_ones_is_named_skipped_and_counted(arguments, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(10):
        (photos / f"{index}.jpg").write_bytes(picture(kind="JPEG"))
    (photos / "cut.jpg").write_bytes(picture(kind="JPEG")[:300])
    assert main([*arguments(kimg=0.008), "--data", str(photos)]) == 0
    out = capsys.readouterr().out
    assert "10 images, 1 files skipped" in out
    assert "cut.jpg" in out


def test_a_zip_that_climbs_out(error_of, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../escaped.png", picture())
    assert "escaped.png" in error_of("--data", tmp_path / "evil.zip")


def test_batch_larger_than_the_data(error_of):
    assert "60" in (error := error_of(batch_size=64))
    assert "64" in error
    assert "batch_size" in error.replace("-", "_")


def test_size_that_is_no_power_of_two(error_of):
    assert "--image-size: expected a power of two" in error_of(image_size=48)


def test_device_that_is_not_there(error_of):
    assert "--device: expected auto, cpu, cuda or cuda:N; got 'abacus'" in error_of("--device", "abacus")


def test_output_folder_in_use(error_of, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "not empty; choose another folder, or go on with --resume" in error_of()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_output_folder_is_a_file(error_of, tmp_path):
    (tmp_path / "run").write_text("x")
    assert "is there already" in error_of()


def test_output_that_cannot_be_written(arguments, tmp_path, monkeypatch, capsys):
    """Root may write anywhere, so the refusal is the operating system's own error, raised where it would come."""
    import fastgan.train.loop as loop

    def refuse(config):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(config.out))

    monkeypatch.setattr(loop, "make_run_folder", refuse)
    assert main(arguments()) == 2
    assert f"{tmp_path / 'run'}: Permission denied; choose a folder that you may write to" in capsys.readouterr().err


def test_unknown_instruction_set_leaves_no_run_folder(arguments, tmp_path):
    """In a process of its own: FASTGAN_CPU is read once."""
    command = [sys.executable, "-m", "fastgan.train", *arguments()]
    before, environment = set(tmp_path.rglob("*")), os.environ | {"FASTGAN_CPU": "sse9"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: FASTGAN_CPU must be plain, avx2, avx512 or amx, got sse9\n")
    assert set(tmp_path.rglob("*")) == before


def test_disk_full_from_the_start(arguments, tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    given = arguments()
    main([*given[: given.index("--out")], *given[given.index("--out") + 2 :], "--out", str(tmp_path / "warm")])
    monkeypatch.setattr(os, "fsync", full)
    assert main(given) == 2
    assert "step-000000000.safetensors: No space left on device; free some space" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (["--loss", "hing"], "'hinge'"),
        (["--crop", "middle"], "'center'"),
        (["--optimizer", "lion"], "'adamw'"),
        (["--precision", "fp8"], "'bf16'"),
        (["--preset", "1024"], "'256'"),
        (["--batchsize", "8"], "--batch-size"),
        (["--kimg", "many"], "--kimg"),
    ],
)
def test_unknown_values_list_the_known_ones(given, known, capsys):
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
    assert known in capsys.readouterr().err


def test_unknown_backend_lists_the_known_ones(error_of):
    assert "eager, cpu, triton, cuda" in error_of("--backend", "rocm")


def test_npy_of_another_shape(error_of, tmp_path):
    np.save(tmp_path / "curve.npy", np.zeros((3, 4)))
    assert "curve.npy" in error_of("--data", tmp_path / "curve.npy")


def test_debug_shows_the_traceback(arguments, tmp_path, capsys):
    assert main([*arguments(), "--data", str(tmp_path / "nowhere"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FastganError("a says b"), 2, "error: a says b"),
        (OSError(errno.ENOSPC, "No space left", "f"), 2, "error: f: No space left; free some space"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_codes(error, code, text, capsys):
    def fail():
        raise error

    assert run_command(fail, debug=False) == code
    assert text in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(fail, debug=False)
