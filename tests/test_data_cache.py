"""The cache: decoded once, complete or absent, shared by processes, and clear about what it cannot do."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.data import DataWarning, prepare
from fastgan.data.preparation import open_source
from fastgan.errors import DataError


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(200):
        Image.new("L", (8, 8), i).save(folder / f"{i:03}.png")
    return folder


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


class Calls:
    """A progress callback that counts, and does something the first time."""

    def __init__(self, first=lambda: None):
        self.seen: list[tuple[int, int]] = []
        self._first = first

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))
        if len(self.seen) == 1:
            self._first()


def test_images_are_decoded_once(photos, cache):
    progress = Calls()
    first = prepare(photos, 8, cache_dir=cache, progress=progress)
    assert progress.seen[-1] == (200, 200)
    assert progress.seen == sorted(progress.seen)
    again = Calls()
    second = prepare(photos, 8, cache_dir=cache, progress=again)
    assert again.seen == []
    assert isinstance(second.images, np.memmap)
    assert np.array_equal(first.images, second.images)
    assert {k: v for k, v in vars(first).items() if k != "images"} == {
        k: v for k, v in vars(second).items() if k != "images"
    }
    with pytest.raises(ValueError, match="read-only"):
        second.images[0] = 0


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "000.png").unlink(),
        lambda folder: (folder / "000.png").rename(folder / "zzz.png"),
        lambda folder: shutil.copy(folder / "000.png", folder / "new.png"),
        lambda folder: Image.new("L", (8, 8), 77).save(folder / "000.png"),
    ],
    ids=["deleted", "renamed", "added", "modified"],
)
def test_a_changed_folder_is_decoded_again(photos, cache, change):
    before = prepare(photos, 8, cache_dir=cache)
    change(photos)
    os.utime(photos / "001.png")
    after = prepare(photos, 8, cache_dir=cache)
    assert after.fingerprint != before.fingerprint
    assert len(entries(cache)) == 2


def test_each_preparation_has_an_entry_of_its_own(photos, cache):
    shapes = {
        (8, None, "center"): (8, 1),
        (4, None, "center"): (4, 1),
        (8, 3, "center"): (8, 3),
        (4, None, "none"): (4, 1),
        (4, 4, "center"): (4, 4),
    }
    for (size, channels, crop), (side, depth) in shapes.items():
        prepared = prepare(photos, size, channels=channels, crop=crop, cache_dir=cache)
        assert prepared.images.shape == (200, side, side, depth)
    assert len(entries(cache)) == len(shapes)


def test_random_crops_keep_an_eighth_more(tmp_path, cache):
    Image.new("L", (100, 50), 9).save(tmp_path / "a.png")
    prepared = prepare(tmp_path, 32, crop="random", cache_dir=cache)
    assert prepared.images.shape == (1, 36, 36, 1)
    assert prepared.image_size == 32


def test_the_fingerprint_knows_content_not_place_or_time(photos, tmp_path):
    def fingerprint(folder: Path) -> str:
        return prepare(folder, 8, cache_dir=tmp_path / "cache").fingerprint

    first = fingerprint(photos)
    copy = Path(shutil.copytree(photos, tmp_path / "copy"))
    os.utime(copy / "005.png", (1, 1))
    assert fingerprint(copy) == first
    Image.new("L", (8, 8), 6).save(copy / "005.png")
    assert fingerprint(copy) != first


def test_cache_folder_comes_from_the_argument_then_the_environment_then_home(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTGAN_CACHE", raising=False)
    prepare(photos, 8)
    assert len(entries(tmp_path / "home" / ".cache" / "fastgan")) == 1
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "named"))
    prepare(photos, 8)
    assert len(entries(tmp_path / "named")) == 1
    prepare(photos, 8, cache_dir=tmp_path / "given")
    assert len(entries(tmp_path / "given")) == 1


# --- several processes, and death ---


def test_a_second_process_that_is_faster_wins_and_nothing_is_lost(photos, cache):
    inner = []
    overtaken = Calls(lambda: inner.append(prepare(photos, 8, cache_dir=cache)))
    outer = prepare(photos, 8, cache_dir=cache, progress=overtaken)
    assert np.array_equal(outer.images, inner[0].images)
    assert len(entries(cache)) == 1


def _prepare_and_report(photos, cache, barrier, queue):
    barrier.wait(60)
    queue.put(prepare(photos, 8, cache_dir=cache).fingerprint)


def test_two_processes_at_once(photos, cache):
    fork = multiprocessing.get_context("fork")
    barrier, queue = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=_prepare_and_report, args=(photos, cache, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert fingerprints == {prepare(photos, 8, cache_dir=cache).fingerprint}
    assert len(entries(cache)) == 1


def test_a_killed_process_leaves_no_entry_and_its_rest_is_cleared_a_day_later(photos, cache):
    die = Calls(lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(
        target=prepare, args=(photos, 8), kwargs={"cache_dir": cache, "progress": die}
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = entries(cache)
    assert left.startswith(".")
    assert len(prepare(photos, 8, cache_dir=cache)) == 200
    assert left in entries(cache), "it may belong to a living process"
    yesterday = time.time() - 25 * 3600
    for path in (*(cache / left).iterdir(), cache / left):
        os.utime(path, (yesterday, yesterday))
    prepare(photos, 4, cache_dir=cache)
    assert left not in entries(cache)
    assert len(entries(cache)) == 2


def test_all_of_an_entry_is_on_disk_before_it_appears(photos, cache, monkeypatch):
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        synced.append((name, any(entry.startswith("images-") for entry in entries(cache))))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    prepare(photos, 8, cache_dir=cache)
    *before, folder, root = synced
    assert sorted(before) == [("images.u8", False), ("meta.json", False)]
    assert folder[0].startswith(".images-")
    assert folder[1] is False
    assert root == ("cache", True)


def test_an_interrupt_leaves_nothing_behind(photos, cache):
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(photos, 8, cache_dir=cache, progress=Calls(interrupt))
    assert entries(cache) == []


@pytest.mark.parametrize("file", ["images.u8", "labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_entry_is_made_anew(tmp_path, cache, file, damage):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("L", (8, 8), len(name)).save(tmp_path / "photos" / name / "a.png")
    before = prepare(tmp_path / "photos", 8, cache_dir=cache)
    path = cache / entries(cache)[0] / file
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    after = prepare(tmp_path / "photos", 8, cache_dir=cache)
    assert after.fingerprint == before.fingerprint
    assert after.labels.tolist() == [0, 1]
    progress = Calls()
    prepare(tmp_path / "photos", 8, cache_dir=cache, progress=progress)
    assert progress.seen == [], "whole again"


def test_a_folder_that_changes_while_it_is_read_is_an_error(photos):
    source = open_source(photos)
    assert len(list(source)) == 200
    Image.new("L", (8, 8), 0).save(photos / "late.png")
    with pytest.raises(DataError, match=r"photos changed while it was being read"):
        list(source)


# --- disks ---


def test_a_full_disk_is_named_before_any_work_where_it_can_be(photos, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 12799))
    progress = Calls()
    with pytest.raises(DataError, match=r"need 12800 bytes, .*cache has 12799 left; free some space"):
        prepare(photos, 8, cache_dir=cache, progress=progress)
    assert progress.seen == []
    assert entries(cache) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_explained_and_cleared(photos, cache, monkeypatch, code):
    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written to .*cache: the disk is full .*FASTGAN_CACHE"):
        prepare(photos, 8, cache_dir=cache)
    assert entries(cache) == []


def test_a_write_that_the_system_refuses_is_explained_and_cleared(photos, cache):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # files of 12,800 bytes do not fit
    try:
        with pytest.raises(DataError, match=r"cannot be written to .*cache: the disk is full \(File too large\)"):
            prepare(photos, 8, cache_dir=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(cache) == []
    assert len(prepare(photos, 8, cache_dir=cache)) == 200


def test_a_chosen_cache_folder_that_cannot_be_written_is_an_error(photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache cannot be written to \(Not a directory\)"):
        prepare(photos, 8, cache_dir=tmp_path / "file" / "cache")
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file cannot be written to"):
        prepare(photos, 8)


def test_without_a_writable_home_the_images_live_for_this_process(photos, tmp_path, monkeypatch):
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTGAN_CACHE", raising=False)
    before = sorted(tmp_path.iterdir())
    with pytest.warns(DataWarning, match=r"cannot be written to \(Not a directory\); images are decoded anew"):
        prepared = prepare(photos, 8)
    assert prepared.images[:, 0, 0, 0].tolist() == list(range(200))
    assert sorted(tmp_path.iterdir()) == before


# --- memory and order ---


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("fastgan.data.preparation._MAX_WORKERS", 2)
    count, side = 2000, 128
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (count, side, side, 3)).flush()
    tracemalloc.start()
    try:
        prepared = prepare(tmp_path / "x.npy", side, channels=3, cache_dir=cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert prepared.images.nbytes == count * side * side * 3
    assert peak < prepared.images.nbytes / 2


def test_the_order_does_not_depend_on_the_number_of_threads(photos, tmp_path, monkeypatch):
    fingerprints = set()
    for workers in (1, 2, 7):
        monkeypatch.setattr("fastgan.data.preparation._MAX_WORKERS", workers)
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=workers: range(n))
        monkeypatch.setattr("fastgan.data.preparation._BLOCK_BYTES", 8 * 8 * 4 * workers)
        prepared = prepare(photos, 8, cache_dir=tmp_path / str(workers))
        assert prepared.images[:, 0, 0, 0].tolist() == list(range(200))
        fingerprints.add(prepared.fingerprint)
    assert len(fingerprints) == 1
