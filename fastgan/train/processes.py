"""The processes that train one run together, and the little that they tell each other besides gradients.

`torchrun --nproc-per-node N -m fastgan.train` starts N processes that find each other through the environment
(RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). All run the same program with the same random states, each on
its part of every batch; rank 0 alone prints and writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.errors import FastganError

# Rank 0 may decode a large data set, or write to a slow disk, while the others wait; a process that died is noticed by
# its closed connection and by torchrun, not by the clock.
_PATIENCE = timedelta(days=1)


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes that torchrun started are one group; a process alone stays alone.

    Of several processes that fail, only the first raises what went wrong; the others, which mostly fail because it
    did, leave by SystemExit without a word.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _is_first(store):
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        raise SystemExit(130 if stopped else getattr(error, "exit_code", 2)) from None
    dist.destroy_process_group()


@contextmanager
def only_rank_0_prints() -> Iterator[None]:
    """For what all processes would print alike: help, and errors in the command line."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _is_first(store: dist.Store) -> bool:
    try:
        return store.add("fastgan/ended", 1) == 1
    except RuntimeError:  # the process that holds the store has ended already
        return False


class Processes:
    """This process among those that train together: `rank` of `count`, `group` (None: alone)."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.group.WORLD if together else None
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if together else 0
        self.leads = self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """Which of the machine's devices of this kind is this process's."""
        if self.count == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise FastganError(f"--device: {device} is one device for {self.count} processes; expected cuda")
        if self.local_rank >= (found := torch.cuda.device_count()):
            raise FastganError(
                f"--device: process {self.local_rank} of this machine finds {found} CUDA devices; start as many "
                "processes as there are (torchrun --nproc-per-node)"
            )
        return torch.device("cuda", self.local_rank)

    def part(self, batch_size: int) -> int:
        """This process's images of a batch; FastganError where they cannot be shared equally."""
        if batch_size % self.count:
            raise FastganError(
                f"--batch-size: {batch_size} images cannot be shared equally by {self.count} processes; take "
                f"{-(-batch_size // self.count) * self.count}"
            )
        return batch_size // self.count

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """First one process of each machine runs the block, then the others: they find what it left in a cache."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        self.largest(0)

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.group is None:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX, self.group)
        return int(shared)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of all processes' `values` (on the CPU)."""
        if self.group is None:
            return values
        dist.all_reduce(values, group=self.group)
        return values / self.count

    def told(self, value: Any) -> Any:
        """Rank 0's `value`, on every process."""
        if self.group is None:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, 0, self.group)
        return shared[0]
