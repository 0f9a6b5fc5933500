"""Batches: each epoch a permutation, a pure function of seed and position, resumable anywhere."""

import gc
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.data import Batches, PreparedImages, to_uint8
from fastgan.data.batches import epoch_order
from fastgan.errors import DataError


def numbered(count: int, side: int = 2, image_size: int | None = None, fingerprint: str = "f") -> PreparedImages:
    """Images whose first two pixels spell their index."""
    images = np.zeros((count, side, side, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = divmod(np.arange(count), 256)
    return PreparedImages(images, None, [], "numbers", image_size or side, "center", fingerprint)


def indices(batch: torch.Tensor) -> list[int]:
    pixels = to_uint8(batch).astype(int)
    return (pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 1, 0]).tolist()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_each_epoch_is_a_permutation(data):
    count = data.draw(st.integers(1, 300), "images")
    size = data.draw(st.integers(1, count), "batch size")
    seed = data.draw(st.integers(0, 2**64), "seed")
    with Batches(numbered(count), size, seed=seed) as batches:
        for epoch in range(3):
            assert batches.epoch == epoch
            shown = [i for _ in range(count // size) for i in indices(next(batches))]
            assert len(shown) == count - count % size
            assert len(set(shown)) == len(shown)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_resuming_anywhere_equals_an_unbroken_run(data):
    count = data.draw(st.integers(1, 50), "images")
    size = data.draw(st.integers(1, count), "batch size")
    stop = data.draw(st.integers(0, 3 * (count // size)), "position")
    options = {"seed": data.draw(st.integers(0, 9), "seed"), "flip": True, "crop_size": 3}
    prepared = PreparedImages(
        np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), np.uint8),
        None,
        [],
        "noise",
        5,
        "random",
        "f",
    )
    with Batches(prepared, size, **options) as unbroken, Batches(prepared, size, **options) as stopped:
        for _ in range(stop):
            next(unbroken)
            next(stopped)
        state = stopped.state_dict()
        assert state["position"] == stop
        # One continues in a new process with another seed, one goes back after having drawn further.
        with Batches(prepared, size, seed=77, flip=True, crop_size=3) as resumed:
            next(resumed)
            resumed.load_state_dict(state)
            next(stopped)
            next(stopped)
            stopped.load_state_dict(state)
            for _ in range(count // size + 1):
                expected = next(unbroken)
                assert torch.equal(next(resumed), expected)
                assert torch.equal(next(stopped), expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**70), st.integers(0, 2**40), st.integers(1, 2000))
def test_every_order_is_a_permutation(seed, epoch, count):
    assert np.array_equal(np.sort(epoch_order(seed, epoch, count)), np.arange(count))


def test_the_order_is_pinned():
    # A saved run must continue alike under any version of NumPy and of fastgan.
    assert epoch_order(0, 0, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert epoch_order(0, 1, 8).tolist() == [7, 6, 4, 5, 3, 1, 0, 2]
    assert epoch_order(1, 0, 8).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]


def test_orders_look_random():
    orders = np.array([epoch_order(seed, epoch, 100) for seed in range(20) for epoch in range(20)])
    assert len(np.unique(orders, axis=0)) == 400
    # Each place holds each image equally often on average: 49.5, with a standard error of 28.9 / 20.
    assert np.abs(orders.mean(axis=0) - 49.5).max() < 6 * 28.9 / 20


def test_flips_mirror_about_half_of_the_images_and_nothing_else():
    images = np.zeros((1000, 4, 4, 1), np.uint8)
    images[:, 0, :, 0] = [1, 2, 3, 4]
    prepared = PreparedImages(images, None, [], "ramps", 4, "center", "f")
    with Batches(prepared, 1000, flip=True) as batches:
        first, second = to_uint8(next(batches))[:, 0, :, 0], to_uint8(next(batches))[:, 0, :, 0]
    mirrored = (first == [4, 3, 2, 1]).all(axis=1)
    assert (mirrored | (first == [1, 2, 3, 4]).all(axis=1)).all()
    assert 400 < mirrored.sum() < 600
    assert not np.array_equal(first, second)
    with Batches(prepared, 1000) as batches:
        assert (to_uint8(next(batches))[:, 0, :, 0] == [1, 2, 3, 4]).all()


def test_no_two_epochs_or_batches_are_alike():
    with Batches(numbered(100), 100) as batches:
        assert indices(next(batches)) != indices(next(batches)), "each epoch has an order of its own"
    images = np.tile(np.array([1, 2], np.uint8)[:, None], (200, 2, 1, 1))
    prepared = PreparedImages(images, None, [], "ramps", 2, "center", "f")
    with Batches(prepared, 100, flip=True) as batches:
        first, second = (to_uint8(next(batches))[:, 0, 0, 0] for _ in range(2))
        assert batches.epoch == 1
    assert not np.array_equal(first, second), "each batch in an epoch has flips of its own"


def test_random_crops_reach_every_place_and_stay_inside():
    images = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1).repeat(2000, axis=0)
    prepared = PreparedImages(images, None, [], "grids", 3, "random", "f")
    with Batches(prepared, 2000) as batches:
        corners = to_uint8(next(batches))
    assert corners.shape == (2000, 3, 3, 1)
    assert np.array_equal(corners - corners[:, :1, :1], np.broadcast_to(images[:1, :3, :3], (2000, 3, 3, 1)))
    places, counts = np.unique(corners[:, 0, 0, 0], return_counts=True)
    assert places.tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert counts.min() > 150


def test_batches_have_the_promised_form():
    prepared = PreparedImages(np.full((8, 4, 4, 3), 255, np.uint8), None, [], "white", 4, "center", "f")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with Batches(prepared, 2, dtype=dtype) as batches:
            batch = next(batches)
            assert batch.shape == (2, 3, 4, 4)
            assert batch.dtype == dtype
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert (batch == 1).all()


def test_for_another_device_bytes_travel_and_become_numbers_there(monkeypatch):
    moved = []
    monkeypatch.setattr(
        "fastgan.data.batches.normalise_on_device", lambda pixels: moved.append(pixels) or pixels.float()
    )
    with Batches(numbered(8, side=4), 2, device="meta", dtype=torch.float16) as batches:
        batch = next(batches)
    assert moved[0].dtype == torch.uint8
    assert moved[0].device.type == "meta"
    assert batch.shape == (2, 1, 4, 4)
    assert batch.dtype == torch.float16
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_the_callers_own():
    with Batches(numbered(8), 8) as batches:
        next(batches).fill_(-1)
        assert sorted(indices(next(batches))) == list(range(8))


def test_no_global_random_state_is_touched():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with Batches(numbered(10), 3, flip=True) as batches:
        first = [indices(next(batches)) for _ in range(5)]
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is the point
    with Batches(numbered(10), 3, flip=True) as batches:
        assert [indices(next(batches)) for _ in range(5)] == first


def test_the_thread_ends_with_close_and_with_the_last_reference():
    def threads() -> int:
        return sum(thread.name.startswith("fastgan-batches") for thread in threading.enumerate())

    before = threads()
    batches = Batches(numbered(10), 3)
    next(batches)
    assert threads() == before + 1
    batches.close()
    batches.close()
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    batches = Batches(numbered(10), 3)
    next(batches)
    del batches
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("fastgan-batches"):
            thread.join(5)
    assert threads() == before


def test_an_error_in_the_background_reaches_the_caller(monkeypatch):
    with Batches(numbered(10), 3) as batches:
        monkeypatch.setattr("fastgan.data.batches.normalise", lambda pixels: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(batches)
        assert batches.position == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, r"batch_size: expected 1 to 10, the number of images in numbers, got 11"),
        ({"batch_size": 0}, r"batch_size: expected 1 to 10"),
        ({"batch_size": 2, "crop_size": 3}, r"crop_size: expected 1 to 2"),
        ({"batch_size": 2, "crop_size": 0}, r"crop_size: expected 1 to 2"),
        ({"batch_size": 2, "seed": -1}, r"seed: expected a whole number >= 0"),
    ],
)
def test_impossible_arguments_are_named(options, message):
    with pytest.raises(DataError, match=message):
        Batches(numbered(10), **options)


def test_a_state_of_another_data_set_or_batch_size_is_refused():
    with Batches(numbered(10), 2) as batches:
        next(batches)
        state = batches.state_dict()
    with (
        Batches(numbered(10, fingerprint="g"), 2) as other,
        pytest.raises(DataError, match="not what the run"),
    ):
        other.load_state_dict(state)
    with (
        Batches(numbered(10), 5) as other,
        pytest.raises(DataError, match="batch_size: the run was trained with 2"),
    ):
        other.load_state_dict(state)
