"""safe_open's prefetch on the CPU, with the meaning it has in safetensors 0.9.0rc1."""

from __future__ import annotations

import contextlib
import errno
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import BACKENDS, evict, file_bytes, interrupted_after, run_script, thread_count, write_tensors
from conftest import entry as header_entry
from support.simulated import raw

import weightload
from weightload import _C, errors, settings
from weightload._api import prefetch

MIB = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [(f"{i}", "F32", [256, 1024]) for i in range(40)]
    tensors += [("cube", "F16", [4, 3, 6]), ("scalar", "F64", []), ("none", "F32", [0, 3]), ("odd", "I64", [5])]
    return write_tensors(tmp_path_factory.mktemp("prefetch") / "p.safetensors", tensors)


@pytest.fixture(scope="module")
def whole(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(raw(ours), raw(theirs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_some_tensors(path: Path, whole: dict[str, torch.Tensor], backend: Any) -> None:
    plan = {"cube": slice(1, 3), "odd": slice(-3, None), "7": None, "none": None, "3": slice(2, 2), "5": slice(9, 4)}
    with weightload.safe_open(path, backend=backend) as file:
        with file.prefetch(plan) as loader:
            assert loader.names() == ["3", "5", "7", "cube", "none", "odd"]
            assert len(loader) == 6
            assert same(loader.take("odd"), whole["odd"][-3:])
            assert loader.take("3").shape == loader.take("5").shape == (0, 1024)
            with pytest.raises(errors.TensorError, match="tensor 8 is not in the prefetch plan"):
                loader.take("8")
            with pytest.raises(errors.TensorError, match="tensor odd was taken before"):
                loader.take("odd")
            rest = dict(loader)
            assert dict(loader) == {}
    assert sorted(rest) == ["7", "cube", "none"]
    assert same(rest["cube"], whole["cube"][1:3])
    assert same(rest["7"], whole["7"])
    assert rest["7"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_in_the_order_of_the_file(path: Path, whole: dict[str, torch.Tensor], backend: Any) -> None:
    with weightload.safe_open(path, backend=backend) as file:
        loader = file.prefetch(threads=3)
    names = []
    for name, tensor in loader:  # the handle is closed; the loader is not
        names.append(name)
        assert same(tensor, whole[name])
    assert names == loader.names() == list(weightload.load_file(path))
    loader.close()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({}, "prefetch plan selects no tensors"),
        ({"missing": None}, "File does not contain tensor missing"),
        ({"odd": 3}, "prefetch plan values must be None or a slice, got int for odd"),
        ({"odd": slice(0, 4, 2)}, "prefetch plan slices must have step 1, got 2 for odd"),
        ({"odd": slice(0, 4, 0)}, "invalid prefetch plan slice for odd"),
        ({"odd": slice(0, 6)}, "slice bound 6 for odd is out of range for 5 rows"),
        ({"odd": slice(-6, None)}, "slice bound -6 for odd is out of range for 5 rows"),
        ({"odd": slice(1.5)}, "prefetch plan slice bounds for odd must be integers or None"),
        ({"scalar": slice(0, 1)}, "cannot slice rows of the 0-d tensor scalar"),
    ],
)
def test_plans_that_make_no_sense(path: Path, plan: dict[str, Any], words: str) -> None:
    with weightload.safe_open(path) as file, pytest.raises(errors.TensorError, match=words):
        file.prefetch(plan)
    gc.collect()


def test_dtypes_that_torch_lacks(tmp_path: Path) -> None:
    odd = tmp_path / "f6.safetensors"
    odd.write_bytes(file_bytes({"six": header_entry("F6_E2M3", [4], 0, 3)}, b"abc"))
    with weightload.safe_open(odd) as file:
        with pytest.raises(errors.TensorError, match="prefetch cannot hand out dtype F6_E2M3") as caught:
            file.prefetch()
        assert caught.value.tensor == "six"
        with pytest.raises(errors.TensorError, match="torch has no dtype for F6_E2M3"):
            file.get_tensor("six")
    del caught
    gc.collect()


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_loads_without_being_asked(path: Path, backend: Any, arm: Callable[..., None]) -> None:
    """All of the plan, though nobody takes a tensor and the window is small: after that no byte is read any more."""
    evict([path])
    arm("delay", count=0)
    with settings.override(window_bytes=MIB, task_bytes=MIB, threads=2):
        with weightload.safe_open(path, backend=backend) as file, file.prefetch() as loader:
            end = time.monotonic() + 60
            while _C.reads_since_armed() < 40 and time.monotonic() < end:
                time.sleep(0.01)
            assert _C.reads_since_armed() >= 40
            assert loader.take("39").shape == (256, 1024)


def test_two_loaders_of_one_handle(path: Path, whole: dict[str, torch.Tensor]) -> None:
    with weightload.safe_open(path) as file:
        with file.prefetch({"1": None, "2": None}) as first, file.prefetch({"2": None}) as second:
            assert same(second.take("2"), whole["2"])
            assert same(first.take("2"), whole["2"])
            assert same(file.get_tensor("1"), whole["1"])
            assert same(first.take("1"), whole["1"])


def test_a_closed_loader(path: Path, whole: dict[str, torch.Tensor]) -> None:
    with weightload.safe_open(path) as file:
        loader = file.prefetch()
        kept = loader.take("4")
        loader.close()
        with pytest.raises(weightload.WeightLoadError, match="the prefetch loader is closed"):
            loader.take("5")
        assert dict(loader) == {}
    assert same(kept, whole["4"])
    gc.collect()


def test_threads_share_a_loader(path: Path, whole: dict[str, torch.Tensor]) -> None:
    got: list[tuple[str, torch.Tensor]] = []

    def drain(loader: Any) -> None:
        for pair in loader:
            got.append(pair)

    with weightload.safe_open(path) as file, file.prefetch() as loader:
        threads = [threading.Thread(target=drain, args=(loader,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(name for name, _ in got) == sorted(whole)
    assert all(same(tensor, whole[name]) for name, tensor in got)


def test_closing_wakes_who_waits(path: Path, arm: Callable[..., None]) -> None:
    """The load would take half a minute."""
    evict([path])
    arm("delay", first=4, count=10**6, delay_ms=400)
    caught: list[BaseException] = []
    waiting = threading.Event()

    def wait(loader: Any) -> None:
        try:
            loader.take("0")
            waiting.set()
            loader.take("39")
        except weightload.WeightLoadError as error:
            caught.append(error)

    with settings.override(task_bytes=MIB, threads=1), weightload.safe_open(path, backend="pread") as file:
        loader = file.prefetch()
        thread = threading.Thread(target=wait, args=(loader,))
        thread.start()
        assert waiting.wait(60)
        loader.close()
        thread.join()
    assert [str(error) for error in caught] == ["the prefetch loader is closed"]
    caught.clear()
    gc.collect()


class Announced:
    """An iterator that says when it is about to be asked for what comes next."""

    def __init__(self, weights: Any, asked: threading.Event) -> None:
        self.close = weights.close
        self._weights, self._asked = weights, asked

    def __next__(self) -> tuple[str, torch.Tensor]:
        self._asked.set()
        return next(self._weights)


def test_what_has_come_can_be_taken_while_another_thread_waits(
    path: Path, arm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tensor would take half a minute."""
    evict([path])
    arm("delay", first=4, count=10**6, delay_ms=400)
    waits, done = threading.Event(), threading.Event()

    def wait(loader: Any) -> None:
        with contextlib.suppress(weightload.WeightLoadError):
            loader.take("39")
        done.set()

    make = prefetch.start
    monkeypatch.setattr(prefetch, "start", lambda *given, **options: Announced(make(*given, **options), waits))
    with settings.override(task_bytes=MIB, threads=1), weightload.safe_open(path, backend="pread") as file:
        loader = file.prefetch()
        loader.take("1")  # "0" came before it
        waits.clear()
        thread = threading.Thread(target=wait, args=(loader,))
        thread.start()
        assert waits.wait(60)
        assert loader.take("0").shape == (256, 1024)
        assert not done.is_set()
        loader.close()
        thread.join()
    gc.collect()


def test_a_forked_child_is_told(path: Path) -> None:
    done = run_script(
        """
        import os, sys, threading, weightload
        class Slow:
            def __next__(self):
                asked.set()
                done.wait()
                raise StopIteration
            def close(self):
                pass
        asked, done = threading.Event(), threading.Event()
        loader = weightload._api.prefetch.PrefetchLoader(Slow(), ["0"], None)
        def wait():
            try:
                loader.take("0")
            except weightload.WeightLoadError:
                pass
        thread = threading.Thread(target=wait)
        thread.start()
        asked.wait()
        child = os.fork()
        if not child:
            try:
                loader.take("0")
            except weightload.WeightLoadError as error:
                loader.close()
                os._exit(0 if "fork" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        done.set()
        thread.join()
        """,
    )
    assert done.returncode == 0, done.stderr


def test_a_handler_that_asks_for_what_is_being_waited_for(path: Path, arm: Callable[..., None]) -> None:
    """It would wait for whom it interrupts."""
    said = []

    def ask(*_: object) -> None:
        with pytest.raises(errors.WeightLoadError, match="what interrupted") as caught:
            loader.take("0")
        said.append(caught.value)

    evict([path])
    with weightload.safe_open(path, backend="pread") as file, interrupted_after(0.1, ask):
        arm("delay", count=3, delay_ms=300)
        with file.prefetch() as loader:
            assert loader.take("1").shape == (256, 1024)
            assert loader.take("0").shape == (256, 1024)
    assert len(said) == 1


def test_a_plan_that_is_no_mapping(path: Path) -> None:
    with weightload.safe_open(path) as file, pytest.raises(TypeError, match="must map names"):
        file.prefetch(["odd"])  # type: ignore[arg-type]


def test_an_error_that_holds_its_loader_is_collected(path: Path, arm: Callable[..., None]) -> None:
    """The loader keeps the error, whose traceback keeps this frame, which keeps the loader."""
    evict([path])

    def fail() -> weakref.ref[Any]:
        loader = weightload.safe_open(path, backend="pread").prefetch()
        arm("error", count=10**6, error_number=errno.EIO)
        with contextlib.suppress(errors.ReadError):
            loader.take("39")
        return weakref.ref(loader)

    gone = fail()
    gc.collect()
    assert gone() is None


def test_bounds_may_be_any_whole_number(path: Path, whole: dict[str, torch.Tensor]) -> None:
    plan = {"odd": slice(np.int64(1), np.int64(3))}
    with weightload.safe_open(path) as file, file.prefetch(plan) as loader:
        assert same(loader.take("odd"), whole["odd"][1:3])


def test_rows_of_packed_elements(all_dtypes: Path) -> None:
    with weightload.safe_open(all_dtypes) as file:
        with pytest.raises(errors.TensorError, match=r"cannot slice rows of F4\.vector: a row is not a whole number"):
            file.prefetch({"F4.vector": slice(0, 2)})
        with file.prefetch({"F4.matrix": slice(1, 3)}) as loader:
            want = file.get_tensor("F4.matrix")[1:3]
            assert same(loader.take("F4.matrix"), want)
    gc.collect()


@pytest.mark.parametrize("threads", [1, 2, 10_000])
def test_threads(path: Path, whole: dict[str, torch.Tensor], threads: int) -> None:
    """No more are started than there is work for."""
    with weightload.safe_open(path, backend="pread") as file, file.prefetch(threads=threads) as loader:
        assert thread_count() <= 50
        assert all(same(tensor, whole[name]) for name, tensor in loader)
        del loader


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_is_raised_for_what_it_concerns_and_again(path: Path, backend: Any, arm: Callable[..., None]) -> None:
    evict([path])
    with settings.override(task_bytes=MIB, threads=1):
        with weightload.safe_open(path, backend=backend) as file:
            arm("error", first=10, count=10**6, error_number=errno.EIO)
            with file.prefetch() as loader:
                for _ in range(2):
                    with pytest.raises(errors.ReadError) as caught:
                        loader.take("39")
                    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
                    assert caught.value.tensor is not None
                assert loader.take("0").shape == (256, 1024)  # came before it
    del caught
    gc.collect()
