"""Two processes in one gloo group, which run a test's functions side by side: `pair(function, *args)`.

`function` must be at the top of a module, as it travels by name; so must what it returns, by value. They start once a
session: two imports of torch are dear.
"""

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60  # for one exchange: whoever waits longer waits for a process that has failed


def _work(rank: int, folder: str, calls: Any, answers: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )
    while (call := calls.get()) is not None:
        number, function, args = call
        try:
            answer = pickle.dumps((True, function(*args)))  # here, where an error is seen: the queue's thread hides it
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        answers.put((number, answer))
    dist.destroy_process_group()


class Pair:
    def __init__(self, folder: str) -> None:
        context = mp.get_context("spawn")
        self._queues = [(context.SimpleQueue(), context.Queue()) for _ in range(2)]
        self._processes = [
            context.Process(target=_work, args=(rank, folder, *queues), daemon=True)
            for rank, queues in enumerate(self._queues)
        ]
        self._number = 0
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable, *args: Any) -> list[Any]:
        """What `function(*args)` returns on rank 0 and on rank 1; an exception on either is an error here."""
        self._number += 1
        for calls, _ in self._queues:
            calls.put((self._number, function, args))
        results = [pickle.loads(self._answer(answers)) for _, answers in self._queues]
        failed = "\n".join(f"rank {rank}: {text}" for rank, (fine, text) in enumerate(results) if not fine)
        assert not failed, failed
        return [value for _, value in results]

    def _answer(self, answers: Any) -> bytes:
        while True:
            number, answer = answers.get(timeout=4 * SECONDS)
            if number == self._number:  # not to a call for which nobody waited any more
                return answer

    def close(self) -> None:
        for calls, _ in self._queues:
            calls.put(None)
        for process in self._processes:
            process.join(10)
            process.kill()


@pytest.fixture(scope="session")
def pair():
    with tempfile.TemporaryDirectory() as folder:
        both = Pair(str(Path(folder)))
        yield both
        both.close()
