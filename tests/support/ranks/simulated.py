"""Functions in several real processes at once, each with the simulated accelerator and a process group.

``with Ranks(3, folder) as ranks: ranks.call(function, ...)`` runs a module-level function, whose first argument is its
rank's ``Rank``, in every process. The processes stay for the next call, because importing torch takes seconds.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.simulated import KIND
from support.simulated import native as start_native

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GROUP_TIMEOUT_S = 60
"""The timeout of collectives: a rank waits this long for one that has left. On a busy machine ranks are late."""

# With a backend for the CPU and without, as "cpu:gloo,cuda:nccl" and "nccl" are.
NCCL = "nccl" if KIND == "cuda" else "simulated_ccl"  # or what stands in for it
BACKENDS = {"both": f"cpu:gloo,{KIND}:{NCCL}", "device": NCCL}
KINDS = list(BACKENDS)


class RanksFailed(AssertionError):
    """Ranks failed; the text has what they said."""


class Rank:
    """One process's view: its number, the number of processes, and groups of them."""

    def __init__(self, number: int, size: int, native: Any) -> None:
        self.number = number
        self.size = size
        self.native = native

    @contextmanager
    def group(
        self, kind: str = "both", ranks: list[int] | None = None, timeout_s: float = GROUP_TIMEOUT_S
    ) -> Iterator[ProcessGroup | None]:
        """A fresh group of these ranks; None on the others. Every process must come here.

        A fresh one for every check, because one that failed stays broken.
        """
        import torch.distributed as dist

        made = dist.new_group(ranks, timedelta(seconds=timeout_s), BACKENDS[kind])
        if made is dist.GroupMember.NON_GROUP_MEMBER:
            yield None
            return
        try:
            yield made
        finally:
            dist.destroy_process_group(made)

    def seed(self, seed: int, longest_us: int = 1500) -> None:
        """Seed the delays, differently from the other ranks'."""
        self.native.seed_delays(seed * self.size + self.number, longest_us)

    def leftovers(self) -> dict[str, Any]:
        """Return what is in use though nothing should be."""
        from conftest import open_checkpoints, thread_count

        gc.collect()
        for device in range(2):
            self.native.synchronize(device)
        gc.collect()
        found = {
            "device memory": self.native.live_bytes(0) + self.native.live_bytes(1),
            "pinned memory": self.native.pinned_bytes(),
            "threads": thread_count(),
            "open files": open_checkpoints(),
        }
        return {what: value for what, value in found.items() if value}


class Ranks:
    """Processes that run functions together. A call that fails or hangs ends them; the next call starts others."""

    def __init__(self, size: int, folder: Path, seed: int, backend: str = BACKENDS["both"]) -> None:
        self._size = size
        self._folder = folder
        self._seed = seed
        self._backend = backend
        self._launches = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 150) -> list[Any]:
        """Run ``function(rank, *arguments)`` in every process; what it returned, by rank.

        Raises:
            RanksFailed: ranks raised, hung, died, or left something in use.
        """
        if not self._processes:
            self._launch()
        module = Path(sys.modules[function.__module__].__file__ or "").stem
        for pipe in self._pipes:
            pipe.send((module, function.__qualname__, arguments, timeout_s))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s + 30  # for the launch; they also watch themselves
        while len(results) + len(failures) < self._size:
            missing = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results and rank not in failures]
            ready = wait(missing, max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    kind, value = self._pipes[rank].recv()
                except EOFError:
                    kind, value = "failed", f"died ({self._processes[rank].wait()})"
                (results if kind == "done" else failures)[rank] = value
            if not ready:
                failures.update({self._pipes.index(pipe): "hangs" for pipe in missing})
        if failures:
            said = [f"rank {rank}: {what}\n{self._said(rank)}" for rank, what in sorted(failures.items())]
            self.close()
            raise RanksFailed("\n".join([*said, f"ranks that did not fail: {sorted(results)}"]))
        return [results[rank] for rank in range(self._size)]

    def close(self) -> list[int]:
        """End the processes, by themselves where they can; their exit codes."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 10
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        codes = [process.returncode for process in self._processes]
        self._processes, self._pipes = [], []
        return codes

    def _launch(self) -> None:
        self._launches += 1
        store = self._folder / f"store.{self._launches}"
        for rank in range(self._size):
            ours, theirs = Pipe()
            arguments = [rank, self._size, store, self._seed, self._backend, theirs.fileno()]
            command = [sys.executable, "-m", "support.ranks.simulated", *arguments]
            paths = os.pathsep.join(sys.path)  # where the test that calls is found, too
            environment = {**os.environ, "PYTHONPATH": paths, "WEIGHTLOAD_SIMULATED_SEED": str(self._seed)}
            with self._errors_of(rank).open("wb") as errors:
                process = subprocess.Popen(
                    [str(part) for part in command],
                    pass_fds=[theirs.fileno()],
                    stdout=errors,
                    stderr=errors,
                    env=environment,
                )
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _errors_of(self, rank: int) -> Path:
        return self._folder / f"stderr.{self._launches}.{rank}"

    def _said(self, rank: int) -> str:
        return self._errors_of(rank).read_text(errors="replace")[-6000:]


def _serve(number: int, size: int, store: str, seed: int, backend: str, pipe: Connection) -> None:
    import torch.distributed as dist

    native = start_native()
    if KIND == "simulated":
        import simulated_accelerator

        simulated_accelerator.register_process_group()
    rank = Rank(number, size, native)
    gc.collect()
    gc.freeze()  # as in conftest.py
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, size),
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
    while True:
        try:
            module, name, arguments, timeout_s = pipe.recv()
        except EOFError:
            break
        faulthandler.dump_traceback_later(timeout_s, exit=True)
        rank.seed(seed)
        try:
            reply = ("done", getattr(importlib.import_module(module), name)(rank, *arguments))
            left = rank.leftovers()
            if left:
                reply = ("failed", f"still in use: {left}")
            pickle.dumps(reply)
        except BaseException:
            reply = ("failed", traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(reply)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5], Connection(int(sys.argv[6])))
