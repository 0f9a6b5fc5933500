"""An endless, shuffled, resumable stream of training batches."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.data.cache import PreparedImages
from fastgan.data.pixels import normalise, normalise_on_device
from fastgan.errors import DataError

_AHEAD = 4
_ORDER, _AUGMENT = 0, 1


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of range(count) that depends on nothing but the arguments.

    It sorts raw random bits, whose stream NumPy promises to keep; that of its own shuffle may change with a
    version.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, _ORDER, epoch])).random_raw(count)
    return np.argsort(bits, kind="stable")


class Batches(Iterator[Tensor]):
    """Real images [B, C, H, W] in [-1, 1], channels-last, without end: next(batches) is the next batch.

    prepared: from `prepare`. batch_size: images per batch; each epoch visits the images in a new order and
    leaves out the last len(prepared) % batch_size of them.
    seed: >= 0; image choice, flips and crops are pure functions of (seed, position).
    flip: mirror each image left to right with probability 1/2.
    crop_size: side of a random cut in pixels; None means prepared.image_size.
    part: (rank, count): this process's images of each batch, where `count` processes share it equally.
    device, dtype: of the batches. Values are computed in float32. To CUDA, bytes travel from pinned memory
    without blocking and become numbers there.

    One background thread prepares the next batches. Global random states are neither used nor changed.
    Raises DataError for a batch larger than the data, or an argument out of range.
    """

    def __init__(
        self,
        prepared: PreparedImages,
        batch_size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        crop_size: int | None = None,
        part: tuple[int, int] = (0, 1),
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        side = prepared.images.shape[1]
        crop_size = prepared.image_size if crop_size is None else crop_size
        if not 1 <= batch_size <= len(prepared):
            raise DataError(
                f"batch_size: expected 1 to {len(prepared)}, the number of images in {prepared.source}, "
                f"got {batch_size}"
            )
        if not 1 <= crop_size <= side:
            raise DataError(f"crop_size: expected 1 to {side}, the side of the prepared images, got {crop_size}")
        rank, count = part
        if not 0 <= rank < count or batch_size % count:
            raise DataError(f"part: expected a rank below a count that divides the batch of {batch_size}, got {part}")
        if seed < 0:
            raise DataError(f"seed: expected a whole number >= 0, got {seed}")
        self.position = 0
        """Batches handed out so far."""
        self.seed = seed
        self.batch_size = batch_size
        self.batches_per_epoch = len(prepared) // batch_size
        self._prepared = prepared
        # A plain array: indexing a memmap builds a new memmap each time.
        self._images = np.asarray(prepared.images)
        self._flip = flip
        self._crop_size = crop_size
        self._part = slice(rank * batch_size // count, (rank + 1) * batch_size // count)
        self._device = torch.device(device)
        self._dtype = dtype
        self._order: tuple[int, int, np.ndarray] | None = None
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "fastgan-batches")
        self._pending: deque[Future[Tensor]] = deque()

    @property
    def epoch(self) -> int:
        """Times that the data has been gone through."""
        return self.position // self.batches_per_epoch

    def __next__(self) -> Tensor:
        self._prefetch()
        batch = self._pending[0].result()
        self._pending.popleft()
        self.position += 1
        self._prefetch()
        if self._device.type != "cpu":
            batch = normalise_on_device(batch.to(self._device, non_blocking=True))
        # The stored order is [B, H, W, C], which seen as [B, C, H, W] is channels-last.
        return batch.to(self._dtype).permute(0, 3, 1, 2)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on with the very next batch: plain numbers and strings."""
        return {
            "position": self.position,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "fingerprint": self._prepared.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch before `state` was saved; seed and position are taken from it.

        Raises DataError if the data set or the batch size is another one, for then no position means the
        same.
        """
        if state["fingerprint"] != self._prepared.fingerprint:
            raise DataError(
                f"{self._prepared.source} (prepared data {self._prepared.fingerprint}) is not what the run "
                f"was trained on ({state['fingerprint']}); resume with the same images, size, channels "
                "and crop"
            )
        if state["batch_size"] != self.batch_size:
            raise DataError(f"batch_size: the run was trained with {state['batch_size']}, got {self.batch_size}")
        self._cancel()
        self.position, self.seed = state["position"], state["seed"]

    def close(self) -> None:
        """End the background thread. No batch can be drawn afterwards."""
        if self._pool is not None:
            self._cancel()
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prefetch(self) -> None:
        if self._pool is None:
            raise RuntimeError("these batches are closed")
        while len(self._pending) < _AHEAD:
            self._pending.append(self._pool.submit(self._make, self.seed, self.position + len(self._pending)))

    def _cancel(self) -> None:
        while self._pending:
            self._pending.pop().cancel()

    def _make(self, seed: int, position: int) -> Tensor:
        """Batch number `position`, [B, H, W, C]: numbers for the CPU, bytes in pinned memory for CUDA."""
        # NumPy throughout: it stays in this thread, where torch would start a second team of threads beside
        # the one that trains.
        epoch, batch = divmod(position, self.batches_per_epoch)
        if self._order is None or self._order[:2] != (seed, epoch):
            self._order = seed, epoch, epoch_order(seed, epoch, len(self._images))
        chosen = self._order[2][batch * self.batch_size :][: self.batch_size][self._part]
        bits = np.random.PCG64(np.random.SeedSequence([seed, _AUGMENT, position])).random_raw((3, self.batch_size))
        bits = bits[:, self._part]
        shape = (len(chosen), self._crop_size, self._crop_size, self._images.shape[3])
        staged = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        pixels = staged.numpy()
        room = self._images.shape[1] - self._crop_size
        if room == 0:
            np.take(self._images, chosen, axis=0, out=pixels, mode="clip")
        else:
            tops, lefts = bits[:2] % (room + 1)
            for i, (image, top, left) in enumerate(zip(chosen, tops, lefts, strict=True)):
                pixels[i] = self._images[image, top : top + self._crop_size, left : left + self._crop_size]
        if self._flip:
            mirrored = bits[2] >> 63 == 1
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return staged if self._device.type != "cpu" else torch.from_numpy(normalise(pixels))
