"""Groups of real processes for the tests of shared loads: started, spoken to, and killed when they take too long.

The processes are forked from one that has imported torch and nothing more, so that a fresh group costs little. Those
that a test leaves healthy serve the next one, since a group must be usable after a failure.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import start, write_three

from support.ranks import scenarios
from support.ranks.scenarios import Drained, Failure, Outcome

DEADLINE = 120.0  # seconds in which every scenario must end, on a machine that is busy with other things
# Seconds, of groups: so much longer that no scenario can end by waiting for it. Whatever ends, somebody has told.
GROUP_TIMEOUT = 1800.0
NO_TIMEOUTS: Mapping[int, float] = {}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "safetensors.torch", "weightload", "pytest"])

# Blocks of 64 KiB, read in pieces of 16: small checkpoints have many of them.
TUNED = {"block_bytes": 65_536, "task_bytes": 16_384, "window_bytes": 262_144, "threads": 2}


STRATEGIES = ["broadcast", "striped"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of 32 blocks each under TUNED, four tensors a block."""
    return write_three(tmp_path_factory.mktemp("blocks"), 128, "U8", 16_384)


@pytest.fixture
def names(checkpoint: list[Path]) -> list[str]:
    """The checkpoint's names in the order in which they are loaded."""
    return [name for name, _ in start(checkpoint)]


class World:
    """Processes that are one another's group, and their lines to the test.

    ``timeouts``: seconds, of the groups of ranks that find out by it.
    ``launched``: with the variable by which torchrun says that all ranks are on one node.
    """

    def __init__(self, size: int, timeouts: Mapping[int, float] = NO_TIMEOUTS, launched: bool = True) -> None:
        self.size, self.healthy = size, True
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[Any] = []
        self._pipes = []
        environment = {"GLOO_SOCKET_IFNAME": "lo"} | ({"LOCAL_WORLD_SIZE": str(size)} if launched else {})
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            timeout = timeouts.get(rank, GROUP_TIMEOUT)
            arguments = (there, rank, size, f"{self._folder.name}/store", timeout, str(self._log(rank)), environment)
            process = CONTEXT.Process(target=scenarios.serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        # None is waited for in a collective, which has a timeout, while it is being made.
        self._all_reach("started")
        self._all_reach("joined")

    def _all_reach(self, where: str) -> None:
        for rank in range(self.size):
            self.wait_until(rank, where)
        self.go_on(*range(self.size))

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.log"

    def start(
        self, scenario: Callable[..., Any], *, per_rank: dict[int, dict[str, Any]] | None = None, **arguments: Any
    ) -> None:
        """Begin a scenario on every rank; ``per_rank`` has arguments that differ."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send((scenario, {**arguments, **(per_rank or {}).get(rank, {})}))

    def run(self, scenario: Callable[..., Any], **arguments: Any) -> list[Outcome]:
        """A scenario from its beginning to its end on every rank."""
        self.start(scenario, **arguments)
        outcomes = [self._end(rank) for rank in range(self.size)]
        return [self._checked(outcome) for outcome in outcomes]

    def wait_until(self, rank: int, where: str) -> None:
        """Wait until a rank has paused at a place."""
        assert self._receive(rank) == ("reached", where)

    def go_on(self, *ranks: int) -> None:
        for rank in ranks:
            self._pipes[rank].send("go on")

    def wait_until_idle(self, rank: int) -> None:
        """Wait until a rank's main thread seems to wait for something: it sleeps whenever one looks."""
        end = time.monotonic() + DEADLINE
        seen = 0
        while seen < 15:
            state = Path(f"/proc/{self.pid(rank)}/stat").read_text().rpartition(")")[2].split()[0]
            seen = seen + 1 if state == "S" else 0
            if time.monotonic() > end:
                self._give_up(f"rank {rank} never waits")
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        return int(self._processes[rank].pid)

    def signal(self, rank: int, number: signal.Signals) -> None:
        if number in (signal.SIGKILL, signal.SIGSTOP):
            self.healthy = False
        os.kill(self.pid(rank), number)

    def exit_status(self, rank: int) -> int:
        """Wait for a rank's end: its exit status, or minus the signal that ended it."""
        self._processes[rank].join(DEADLINE)
        status = self._processes[rank].exitcode
        if status is None:
            self._give_up(f"rank {rank} does not end")
        return int(status)

    def outcome(self, rank: int) -> Outcome:
        """Wait for a rank's result."""
        return self._checked(self._end(rank))

    def _end(self, rank: int) -> Outcome:
        what, outcome = self._receive(rank)
        if what != "done":
            self._give_up(f"rank {rank} is at {what} {outcome}, not at its end")
        return outcome  # type: ignore[no-any-return]

    def _checked(self, outcome: Outcome) -> Outcome:
        if outcome.error is not None or outcome.left_behind:
            self.healthy = False
        assert outcome.error is None, outcome.error
        assert outcome.left_behind == [], f"left behind: {outcome.left_behind}"
        return outcome

    def _receive(self, rank: int) -> tuple[str, Any]:
        """The next message of a rank."""
        try:
            if self._pipes[rank].poll(DEADLINE):
                return self._pipes[rank].recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            self._give_up(f"rank {rank} ended with status {self.exit_status(rank)}")
        self._give_up(f"rank {rank} did not answer within {DEADLINE:.0f} s")
        raise AssertionError

    def _give_up(self, why: str) -> None:
        """Have every rank say where it is, kill them all and fail the test."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
                os.kill(process.pid, signal.SIGUSR1)
                process.join(0.5)
        traces = [f"--- rank {rank}\n{self._log(rank).read_text()}" for rank in range(self.size)]
        self.close()
        pytest.fail("\n".join([why, *traces]))

    def close(self) -> None:
        self.healthy = False
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._folder.cleanup()


_worlds: dict[int, World] = {}


def world(size: int) -> World:
    """The group of this size that healthy scenarios share; a new one where a test spoilt the last."""
    if size in _worlds and not _worlds[size].healthy:
        _worlds.pop(size).close()
    if size not in _worlds:
        _worlds[size] = World(size)
    return _worlds[size]


@contextlib.contextmanager
def fresh_world(size: int, timeouts: Mapping[int, float] = NO_TIMEOUTS, launched: bool = True) -> Iterator[World]:
    """A group of its own, for a test that ruins it."""
    ours = World(size, timeouts, launched)
    try:
        yield ours
    finally:
        ours.close()


def run_ranks(script: str, size: int, folder: Path, *arguments: object) -> list[tuple[int, str]]:
    """Run a script in fresh interpreters, one a rank: (status, output and errors) of each.

    It begins with ``rank`` and a group of all ranks, its own arguments in ``sys.argv[4:]``.
    """
    begin = """
        import datetime, os, sys
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import torch, torch.distributed as dist, weightload
        rank, size, store = int(sys.argv[1]), int(sys.argv[2]), dist.FileStore(sys.argv[3], int(sys.argv[2]))
        limit = datetime.timedelta(seconds=1800)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    """
    text = textwrap.dedent(begin) + textwrap.dedent(script)
    commands = [[sys.executable, "-c", text, str(rank), str(size), f"{folder}/store"] for rank in range(size)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([*command, *map(str, arguments)], **pipes) for command in commands]  # type: ignore[call-overload]
    try:
        outputs = [process.communicate(timeout=DEADLINE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def drained(outcomes: list[Outcome]) -> list[Drained]:
    """The ranks' results; they must have had the same tensors, every one of them right."""
    results = [outcome.value for outcome in outcomes if outcome.value is not None]
    for result in results:
        assert isinstance(result, Drained)
        assert result.wrong == []
    return results


def assert_whole(outcomes: list[Outcome], names: list[str]) -> None:
    """Every rank got everything, in order."""
    for result in drained(outcomes):
        assert result.error is None, result.error
        assert result.names == names, f"{len(result.names)} tensors of {len(names)}"


def assert_same_failure(outcomes: list[Outcome], kind: str, rank: int | None) -> Failure:
    """All ranks got the same tensors, and then the same error."""
    results = drained(outcomes)
    first = results[0].error
    assert first is not None, f"no error, and {len(results[0].names)} tensors"
    assert kind in first.kinds, first
    assert "WeightLoadError" in first.kinds or "OSError" in first.kinds
    for result in results:
        assert result.error == first, f"{result.error} is not {first}"
        assert result.names == results[0].names
    assert first.rank == rank, first
    return first


def assert_done(ranks: list[tuple[int, str]]) -> None:
    """All ranks of ``run_ranks`` printed ``done`` at their end."""
    outputs = "\n".join(output for _, output in ranks)
    assert not any(status for status, _ in ranks), outputs
    assert all(output.strip().endswith("done") for _, output in ranks), outputs
