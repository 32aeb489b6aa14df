"""Scenarios that the ranks of a group run in the tests of shared loads, in the processes that groups.py starts."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import faulthandler
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from conftest import open_checkpoints, running_threads, thread_count

import weightload
from support.zoo.models import ZOO
from weightload import _C, errors, settings
from weightload._verify import checker

STAND_BY = {"fault": "delay", "first": 1 << 60}  # counts reads, and does nothing to them

FAREWELL_SECONDS = 60.0  # a rank that leaves first may still be telling the others, who may be slow


@dataclasses.dataclass
class Failure:
    """An exception, as it travels to the test."""

    kinds: list[str]
    message: str
    filename: str | None
    tensor: str | None
    offset: int | None
    errno: int | None
    rank: int | None

    @staticmethod
    def of(error: BaseException) -> Failure:
        filename = getattr(error, "filename", None)
        places = [getattr(error, name, None) for name in ("tensor", "offset", "errno", "rank")]
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return Failure(kinds, str(error), None if filename is None else os.fsdecode(filename), *places)


@dataclasses.dataclass
class Outcome:
    """How a scenario ended on a rank."""

    value: Any
    error: Failure | None
    left_behind: list[str]


@dataclasses.dataclass
class Drained:
    """The result of one load for its consumer."""

    names: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    error: Failure | None = None
    reads: int = 0
    hashed: list[str] = dataclasses.field(default_factory=list)


class Rank:
    """A rank's view of the world, and its line to the test."""

    def __init__(self, pipe: Connection, rank: int, size: int, timeout: datetime.timedelta) -> None:
        self.pipe, self.rank, self.size, self._timeout = pipe, rank, size, timeout
        self._groups: dict[tuple[object, ...], dist.ProcessGroup] = {}

    def group(self, ranks: Sequence[int] | None, key: str = "") -> dist.ProcessGroup | None:
        """A group of these global ranks in this order, made once; None for the default group."""
        if ranks is None:
            return None
        known = (*ranks, key)
        if known not in self._groups:
            order = {} if list(ranks) == sorted(ranks) else {"sort_ranks": False}
            self._groups[known] = dist.new_group(list(ranks), self._timeout, **order)
        return self._groups[known]

    def pause(self, where: str) -> None:
        """Tell the test that this place is reached, and wait for its word."""
        self.pipe.send(("reached", where))
        assert self.pipe.recv() == "go on"


def serve(
    pipe: Connection, rank: int, size: int, store: str, timeout: float, log: str, environment: dict[str, str]
) -> None:
    """The life of a rank: join the group, then run scenarios until the test hangs up."""
    os.environ.update(environment)
    traces = open(log, "w")  # noqa: SIM115
    faulthandler.enable(traces)
    faulthandler.register(signal.SIGUSR1, traces)
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    limit = datetime.timedelta(seconds=timeout)
    here = Rank(pipe, rank, size, limit)
    here.pause("started")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=limit,
    )
    here.pause("joined")
    while True:
        try:
            scenario, arguments = pipe.recv()
        except EOFError:
            break
        pipe.send(("done", _run(here, scenario, **arguments)))
    dist.destroy_process_group()


def _run(here: Rank, scenario: Callable[..., Any], farewell: bool = False, **arguments: Any) -> Outcome:
    """``farewell``: the rank leaves and may tell the others for as long as it takes; nobody waits for that."""
    value, failure = None, None
    try:
        value = scenario(here, **arguments)
    except BaseException as error:
        failure = Failure.of(error)
    _C.disarm_fault()
    if farewell:
        return Outcome(value, failure, open_checkpoints())
    ended = time.monotonic()
    while (left := _left_behind()) and time.monotonic() - ended < FAREWELL_SECONDS:
        time.sleep(0.002)
    return Outcome(value, failure, left)


def _left_behind() -> list[str]:
    threads = thread_count()
    return [f"{threads} threads"] * (threads > 0) + open_checkpoints()


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _same(ours: torch.Tensor, other: torch.Tensor) -> bool:
    return (ours.dtype, ours.shape) == (other.dtype, other.shape) and torch.equal(_raw(ours), _raw(other))


def ctrl_c(_: str) -> bool:
    """For ``names``: an interrupt while the load is being prepared."""
    raise KeyboardInterrupt


def load(
    here: Rank,
    files: Sequence[Path],
    strategy: str = "auto",
    *,
    reference: Sequence[Path] | None = None,
    tuned: dict[str, int] | None = None,
    fault: dict[str, Any] | None = None,
    ranks: Sequence[int] | None = None,
    pause: Sequence[str] = (),
    leave: tuple[str, int] = ("", -1),
    reduce: bool = False,
    **options: Any,
) -> Drained | None:
    """One load, every tensor compared with safetensors' when it comes and again at the end.

    ``pause`` has numbers of tensors after which to wait for the test, or "call": before the load begins.
    ``leave`` is how to stop ("break", "close", "raise", "collect") and after how many tensors.
    ``reduce`` has the rank use the group for itself between the tensors. A rank outside the group does nothing.
    """
    group = here.group(ranks)
    if ranks is not None and here.rank not in ranks:
        return None
    drained = Drained()
    right = {k: t for file in (files if reference is None else reference) for k, t in _reference(file).items()}
    if "call" in pause:
        here.pause("call")
    if fault:
        _C.arm_fault(**fault)
    try:
        with settings.override(**(tuned or {})):
            weights = weightload.safetensors_weights_iterator(
                files, **{"device": "cpu", "group": group, "strategy": strategy, **options}
            )
        if leave[0] == "collect":
            cycle: list[object] = [weights]
            cycle.append(cycle)
            del cycle
        _consume(here, weights, right, drained, pause, leave, group if reduce else None, reduce)
    except BaseException as error:
        drained.error = Failure.of(error)
    if leave[0] == "collect":
        weights = iter(())
        gc.collect()
    if fault:
        drained.reads = _C.reads_since_armed()
    return drained


def checked(
    here: Rank, files: Sequence[Path], *, hold: bool = False, fail: bool = False, **options: Any
) -> Drained | None:
    """A load with ``verify=``, and which files this rank has hashed.

    ``hold``: hashing never ends by itself. ``fail``: what it hashes cannot be read.
    """
    hashed: list[str] = []
    check = checker.check

    def seen(file: _C.CheckpointFile, expected: str, arrived: Callable[[int], Any]) -> None:
        hashed.append(os.path.basename(file.path))
        while hold:
            arrived(0)  # raises when nobody wants the verdict any more
        if fail:  # not by a fault of reads: others of this process read meanwhile
            raise errors.located(errors.ReadError(f"{file.path}: {os.strerror(errno.EIO)}"), file.path)
        check(file, expected, arrived)

    checker.check = seen
    try:
        drained = load(here, files, **options)
    finally:
        checker.check = check
    if drained is not None:
        drained.hashed = sorted(hashed)
    return drained


def load_checked(here: Rank, files: Sequence[Path], **options: Any) -> dict[str, Any]:
    """load_into: how it ended, and which tensors are wrong."""
    right = {k: t for file in files for k, t in _reference(file).items()}
    target = {name: torch.zeros_like(tensor) for name, tensor in right.items()}
    error = None
    try:
        with settings.override(block_bytes=65_536, task_bytes=16_384):
            weightload.load_into(target, files, group=dist.group.WORLD, **options)
    except Exception as failed:
        error = Failure.of(failed)
    return {"error": error, "wrong": [name for name in right if not _same(target[name], right[name])]}


def _reference(file: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(file)


def _consume(
    here: Rank,
    weights: Iterator[tuple[str, torch.Tensor]],
    right: dict[str, torch.Tensor],
    drained: Drained,
    pause: Sequence[str],
    leave: tuple[str, int],
    group: dist.ProcessGroup | None,
    reduce: bool,
) -> None:
    kept: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in weights:
            drained.names.append(name)
            kept[name] = tensor
            if not _same(tensor, right[name]):
                drained.wrong.append(name)
            count = len(drained.names)
            if str(count) in pause:
                here.pause(str(count))
            if reduce:
                total = torch.tensor([count + dist.get_rank(group)])
                dist.all_reduce(total, group=group)
                size = dist.get_world_size(group)
                assert total.item() == size * count + size * (size - 1) // 2
            if count == leave[1]:
                if leave[0] == "close":
                    weights.close()  # type: ignore[attr-defined]
                if leave[0] == "raise":
                    raise ZeroDivisionError("the consumer's own")
                break
    finally:
        drained.wrong += [f"{name} later" for name, tensor in kept.items() if not _same(tensor, right[name])]


def alone(here: Rank, files: Sequence[Path], who: int, options: dict[str, Any]) -> Drained | None:
    """A load on one rank only."""
    return load(here, files, **options) if here.rank == who else None


def count_reads(here: Rank, files: Sequence[Path], tuned: dict[str, int], strategies: Sequence[str]) -> dict[str, int]:
    """Reads of this rank under each strategy, without those of the headers."""
    counts = {}
    for strategy in strategies:
        _C.arm_fault(**STAND_BY)
        opened = _C.open_files([os.fsencode(path) for path in files], 1)
        if strategy != "independent":
            for file in opened:
                file.header_digest()  # for the agreement: reads the header again
            del file
        headers = _C.reads_since_armed()
        opened.clear()
        drained = load(here, files, strategy, tuned=tuned, fault=STAND_BY, backend="pread")
        assert drained is not None
        assert not drained.wrong, drained.wrong
        assert drained.error is None, drained.error
        counts[strategy] = drained.reads - headers
    return counts


def stats_of(here: Rank, files: Sequence[Path], strategy: str) -> dict[str, Any]:
    """Load on one rank, and return the load's statistics."""
    weights = weightload.safetensors_weights_iterator(files, device="cpu", group=here.group(None), strategy=strategy)
    list(weights)
    return weights.stats().as_dict()


def load_module(
    here: Rank,
    files: Sequence[Path],
    strategy: str,
    shapes: Sequence[tuple[int, int]],
    under: str = "",
    strict: bool = True,
) -> dict[str, Any]:
    """load_into for layers of these shapes, ``under`` put before their names; says which parameters are wrong."""
    module = torch.nn.Sequential(*(torch.nn.Linear(wide, high) for wide, high in shapes))
    target = {f"{under}{name}": tensor for name, tensor in module.state_dict().items()} if under else module
    right = {k: t for file in files for k, t in _reference(file).items()}
    with settings.override(block_bytes=65_536, task_bytes=16_384):
        report = weightload.load_into(target, files, strategy=strategy, strict=strict)
    state = module.state_dict()
    return {
        "loaded": report.loaded,
        "bytes": report.bytes,
        "wrong": [k for k in right if not _same(state[k], right[k])],
    }


def load_animal(here: Rank, files: Sequence[Path], strategy: str, name: str, stubborn: bool = False) -> dict[str, Any]:
    """load_into for a module of the zoo, and load_state_dict for its twin; ``stubborn``: it cannot be filled here.

    Says whether they differ, how the load ended, and whether it had changed anything.
    """
    torch.manual_seed(0)
    ours, theirs = ZOO[name](), ZOO[name]()
    if stubborn:
        ours.register_parameter("stubborn", torch.nn.Parameter(torch.empty(3, device="meta")))
    before = [(tensor._version, tensor.clone()) for tensor in ours.state_dict(keep_vars=True).values()]
    failure, report = None, None
    try:
        with settings.override(block_bytes=65_536, task_bytes=16_384):
            report = weightload.load_into(ours, files, strategy=strategy, strict=False)
    except Exception as error:
        failure = Failure.of(error)
    after = list(ours.state_dict(keep_vars=True).values())
    theirs.load_state_dict({k: t for file in files for k, t in _reference(file).items()}, strict=False)
    right = theirs.state_dict()
    return {
        "same": all(_same(tensor, right[key]) for key, tensor in ours.state_dict().items() if key != "stubborn"),
        "changed": any(
            tensor._version != version or (not tensor.is_meta and not torch.equal(tensor, old))
            for tensor, (version, old) in zip(after, before, strict=True)
        ),
        "took part": report and report.took_part,
        "failure": failure,
    }


def load_module_failing(
    here: Rank, files: Sequence[Path], strategy: str, shape: tuple[int, int], **how: Any
) -> Drained:
    """load_into where some rank cannot."""
    drained = Drained()
    try:
        load_module(here, files, strategy, [shape], **how)
    except Exception as error:
        drained.error = Failure.of(error)
    return drained


def load_of_two(here: Rank, files: Sequence[Path], strategy: str, tuned: dict[str, int]) -> Drained | None:
    """Ranks 0 and 1 load together; the others, which are not in their group, call it with that group too."""
    group = here.group([0, 1], "two")
    return load(here, files, strategy, tuned=tuned, group=group)


def two_at_once(
    here: Rank, files: Sequence[Path], how: str, strategies: tuple[str, str], tuned: dict[str, int]
) -> list[Drained]:
    """Two loads on two groups of all ranks at the same time: "threads" of their own, or "interleaved" in one."""
    groups = [here.group(range(here.size), key) for key in ("first", "second")]
    right = {k: t for file in files for k, t in _reference(file).items()}
    results = [Drained(), Drained()]

    def begin(number: int) -> Iterator[tuple[str, torch.Tensor]]:
        with settings.override(**tuned):
            return weightload.safetensors_weights_iterator(
                files, device="cpu", group=groups[number], strategy=strategies[number]
            )

    def whole(number: int) -> None:
        try:
            _consume(here, begin(number), right, results[number], (), ("", -1), None, False)
        except BaseException as error:
            results[number].error = Failure.of(error)

    if how == "threads":
        threads = [threading.Thread(target=whole, args=[number]) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
    both = [begin(0), begin(1)]
    for pair in zip(*both, strict=True):
        for drained, (name, tensor) in zip(results, pair, strict=True):
            drained.names.append(name)
            if not _same(tensor, right[name]):
                drained.wrong.append(name)
    return results


def second_on_the_same_group(here: Rank, files: Sequence[Path], strategy: str, tuned: dict[str, int]) -> list[Drained]:
    """A load begun when another of the same group is on its way; the first is then finished."""
    right = {k: t for file in files for k, t in _reference(file).items()}
    first, second = Drained(), Drained()
    with settings.override(**tuned):
        weights = weightload.safetensors_weights_iterator(files, device="cpu", strategy=strategy)
        for _ in range(10):
            first.names.append(next(weights)[0])
        try:
            other = weightload.safetensors_weights_iterator(files, device="cpu", strategy=strategy)
            _consume(here, other, right, second, (), ("", -1), None, False)
        except Exception as error:
            second.error = Failure.of(error)
    _consume(here, weights, right, first, (), ("", -1), None, False)
    return [first, second]


def repeat(here: Rank, files: Sequence[Path], times: int, tuned: dict[str, int]) -> list[dict[str, int]]:
    """Load many times: whole, left and failing loads. Return what the process has open before and after them."""

    def some(count: int) -> None:
        for number in range(count):
            strategy = ("broadcast", "striped")[number % 2]
            leave = ("break", 20) if number % 5 == 3 else ("", -1)
            bad = number % 10 == 4 and here.rank == here.size - 1
            fault = {"fault": "error", "first": 12, "count": 10**6, "error_number": 5} if bad else None
            drained = load(here, files, strategy, tuned=tuned, fault=fault, leave=leave)
            _C.disarm_fault()
            assert drained is not None
            assert not drained.wrong, drained.wrong

    some(20)
    before = _open_here()
    some(times)
    return [before, _open_here()]


def _open_here() -> dict[str, int]:
    gc.collect()
    descriptors = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            descriptors.append(os.readlink(f"/proc/self/fd/{number}"))
    groups = dist.distributed_c10d._world.pg_map
    return {"descriptors": len(descriptors), "threads": len(running_threads()), "groups": len(groups)}
