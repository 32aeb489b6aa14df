"""The exception of a signal handler reaches the caller of any call, once, whenever the signal comes."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SEED, write_tensors

import weightload
from weightload import _C, settings
from weightload._base.handlers import forgiven

TRIALS = 120
SMALL = [(f"t{i:03d}", "I32", [64]) for i in range(400)]
ODD = [("odd", "U8", [3]), ("behind", "F32", [5])]  # the second lies misaligned

Call = Callable[[Path], object]


class Stop(Exception):
    """Raised by the handler. Not a KeyboardInterrupt: what is caught as an ordinary exception must not swallow it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("moments")
    for number in (1, 2):
        tensors = [(f"{number}.{name}", dtype, shape) for name, dtype, shape in SMALL + ODD]
        write_tensors(where / f"model-{number:05d}-of-00002.safetensors", tensors, seed=number)
    return where


def shards(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def iterate(folder: Path, **options: Any) -> int:
    return sum(1 for _ in weightload.safetensors_weights_iterator(shards(folder), to_cpu=True, **options))


def leave_early(folder: Path) -> int:
    for _ in weightload.safetensors_weights_iterator(shards(folder), to_cpu=True):
        return 0
    return 0


def single_tensors(folder: Path, backend: Any) -> int:
    with weightload.safe_open(shards(folder)[0], backend=backend) as file:
        return len([file.get_tensor(name) for name in file])


def rows(folder: Path) -> int:
    with weightload.safe_open(shards(folder)[0]) as file:
        return len([file.get_slice(f"1.t{i:03d}")[[5, 1, 3]] for i in range(100)])


def take_all(folder: Path, backend: Any) -> int:
    with weightload.safe_open(shards(folder)[0], backend=backend) as file:
        loader = file.prefetch()
        return len([loader.take(name) for name in reversed(loader.names())])


def prefetch_and_leave(folder: Path) -> int:
    with weightload.safe_open(shards(folder)[0]) as file:
        for _ in file.prefetch():
            return 0
    return 0


def into_mapping(folder: Path) -> int:
    target = {
        name: torch.empty(64, dtype=torch.int32) for number in (1, 2) for name in (f"{number}.t001", f"{number}.t399")
    }
    return len(weightload.load_into(target, shards(folder), strict=False).loaded)


def into_module(folder: Path) -> int:
    module = torch.nn.Module()
    module.register_module("1", torch.nn.Module())
    for name, _, _ in SMALL:
        module.get_submodule("1").register_buffer(name, torch.empty(64, dtype=torch.int32))
    return len(weightload.load_model(module, shards(folder)[0], strict=False)[0])


def with_a_bar(folder: Path) -> int:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return iterate(folder, show_progress=True)


CALLS: dict[str, Call] = {
    "iterator": iterate,
    "iterator pread": lambda folder: iterate(folder, backend="pread"),
    "iterator names": lambda folder: iterate(folder, names=lambda name: name.endswith("7")),
    "iterator left early": leave_early,
    "iterator with a bar": with_a_bar,
    "load_file": lambda folder: len(weightload.load_file(shards(folder)[0])),
    "load_file pread": lambda folder: len(weightload.load_file(shards(folder)[0], backend="pread")),
    "load": lambda folder: len(weightload.load(shards(folder)[0].read_bytes())),
    "get_tensor": lambda folder: single_tensors(folder, "mmap"),
    "get_tensor pread": lambda folder: single_tensors(folder, "pread"),
    "get_slice": rows,
    "prefetch": lambda folder: take_all(folder, "mmap"),
    "prefetch pread": lambda folder: take_all(folder, "pread"),
    "prefetch left early": prefetch_and_leave,
    "load_into": into_mapping,
    "load_model": into_module,
    "resolve": lambda folder: len(weightload.resolve_safetensors_files(folder)),
}


@pytest.fixture
def lost() -> Iterator[list[Any]]:
    """Exceptions that Python could only report as ignored."""
    ignored: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, ignored.append
    gc.collect()
    gc.disable()  # finalisers of others
    yield ignored
    gc.enable()
    sys.unraisablehook = before


def interrupted(call: Call, folder: Path, delay: float, stop: type[BaseException] = Stop) -> tuple[int, int]:
    """How often the handler ran, and how often its exception was caught."""
    ran, caught = 0, 0

    def raise_stop(*_: object) -> None:
        nonlocal ran
        ran += 1
        raise stop

    before = signal.signal(signal.SIGALRM, raise_stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            call(folder)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except stop:
        caught += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return ran, caught


def seconds(call: Call, folder: Path) -> float:
    begin = time.perf_counter()
    call(folder)
    return time.perf_counter() - begin


@pytest.mark.parametrize("name", CALLS)
def test_at_any_moment(name: str, folder: Path, lost: list[Any]) -> None:
    call = CALLS[name]
    # Nothing but Ctrl-C's: tqdm has statements that forgive every Exception, in which a handler may run.
    stop = KeyboardInterrupt if name == "iterator with a bar" else Stop
    expected = call(folder)
    lasts = min(seconds(call, folder) for _ in range(5))
    moments = random.Random(SEED)
    reached = 0
    for trial in range(TRIALS):
        ran, caught = interrupted(call, folder, max(1e-6, moments.uniform(0, 1.1 * lasts)), stop)
        assert ran == caught, f"the handler ran {ran} times, {caught} were caught"
        assert lost == []
        reached += caught
        if trial % 20 == 0:
            assert call(folder) == expected
    assert reached > 0
    assert call(folder) == expected


def test_a_prefetch_goes_on_or_says_why(folder: Path, lost: list[Any]) -> None:
    """A tensor that is taken after an interrupt comes, or an error does. Nobody waits for ever."""
    moments = random.Random(SEED)
    for _ in range(TRIALS):
        with settings.override(threads=1), weightload.safe_open(shards(folder)[0], backend="pread") as file:
            loader = file.prefetch()
            interrupted(
                lambda _, take=loader.take: [take(name) for name in SMALL_NAMES], folder, moments.uniform(1e-6, 3e-3)
            )  # type: ignore[misc]
            with contextlib.suppress(weightload.WeightLoadError):
                loader.take("1.behind")
            loader.close()
    assert lost == []


def test_settings_are_taken_back(folder: Path, lost: list[Any]) -> None:
    moments = random.Random(SEED)

    @settings.override(task_bytes=4096)
    def decorated() -> None:
        assert (settings.current().threads, settings.current().task_bytes) == (7, 4096)

    def again(_: Path) -> None:
        for _ in range(20):
            with settings.override(threads=7):
                decorated()

    caught = 0
    for _ in range(5 * TRIALS):
        caught += interrupted(again, folder, moments.uniform(1e-6, 5e-4))[1]
        assert set(settings.origins().values()) == {"default"}
    assert caught > 0
    assert lost == []


SMALL_NAMES = [f"1.{name}" for name, _, _ in SMALL]


def raise_timeout(*_: object) -> None:
    raise TimeoutError


class Handler:
    def __call__(self, *_: object) -> None:
        raise_stop_here()

    def method(self, *_: object) -> None:
        raise Stop


def raise_stop_here() -> None:
    raise Stop


@pytest.mark.parametrize(
    "handler",
    [raise_timeout, Handler(), Handler().method, functools.partial(raise_timeout, 1)],
    ids=["function", "object", "method", "partial"],
)
def test_what_is_forgiven_is_not_a_handlers(handler: Any) -> None:
    """An alarm's TimeoutError is an OSError, and much is done in statements that forgive those."""
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises((TimeoutError, Stop)), forgiven(Exception):
            signal.raise_signal(signal.SIGALRM)
        with forgiven(OSError):
            os.stat("/nonexistent")
        with pytest.raises(ValueError, match="other"), forgiven(OSError):
            raise ValueError("other")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_handler_in_a_finaliser(lost: list[Any]) -> None:
    """An error of a bar's own close() is forgotten. An error that a handler raises meanwhile is not."""

    class Bar:
        __del__ = _C.finish

        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def close(self) -> None:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGALRM)

    Bar(ValueError("I/O operation on closed file"))
    before = signal.signal(signal.SIGALRM, raise_timeout)
    try:
        with pytest.raises(TimeoutError):
            for _ in range(100):  # a moment later
                Bar(None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert lost == []
