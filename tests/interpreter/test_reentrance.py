"""Python code that runs inside a call of the iterator and closes it, or asks it for more."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS, interrupted_after, run_script, write_tensors

import weightload
from weightload import _C

NAMES = [f"{'a long name that is on the heap ' * 3}{i}" for i in range(200)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [(name, "I64", [1000]) for name in NAMES]
    return write_tensors(tmp_path_factory.mktemp("reentrance") / "m.safetensors", tensors)


@pytest.fixture(scope="module")
def wanted(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in weightload.load_file(path).items()}


@pytest.mark.simulated
def test_a_hook_for_warnings_that_closes_the_iterator(
    simulated: Any, path: Path, wanted: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated.fail_pinned_after(0)
    weights = weightload.safetensors_weights_iterator([path], device="simulated:0")
    seen = []

    def close(*about: object, **_: object) -> None:
        seen.append(about[0])
        weights.close()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", close)
        name, tensor = next(weights)
    assert len(seen) == 1
    assert torch.equal(tensor.cpu(), wanted[name])
    assert list(weights) == []


@pytest.mark.simulated
def test_a_warning_that_is_an_error_ends_the_load(simulated: Any, path: Path) -> None:
    simulated.fail_pinned_after(0)
    weights = weightload.safetensors_weights_iterator([path], device="simulated:0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="page-lock"):
            next(weights)
    assert list(weights) == []


class Garbage:
    """A cycle, whose finaliser does something."""

    def __init__(self, do: Any) -> None:
        self.me, self.do = self, do

    def __del__(self) -> None:
        self.do()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finaliser_that_closes_the_iterator(path: Path, wanted: dict[str, torch.Tensor], backend: Any) -> None:
    """Whenever an object is made the garbage collector may run, and with it anybody's finaliser."""
    for before in range(12):
        weights = weightload.safetensors_weights_iterator([path], to_cpu=True, backend=backend)
        got = [next(weights) for _ in range(before)]
        threshold = gc.get_threshold()
        Garbage(weights.close)
        gc.set_threshold(1)
        got += list(weights)
        gc.set_threshold(*threshold)
        assert [name for name, _ in got] == NAMES[: len(got)]
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_handler_that_asks_for_the_next_tensor(path: Path, wanted: dict[str, torch.Tensor], backend: Any) -> None:
    weights = weightload.safetensors_weights_iterator([path], to_cpu=True, backend=backend)
    got: list[tuple[str, torch.Tensor]] = []

    def take_one(*_: object) -> None:
        got.extend(_first(weights))

    with interrupted_after(0.001, take_one):
        _C.arm_fault("delay", count=10**6, delay_ms=1)
        got.extend(weights)
    assert sorted(name for name, _ in got) == sorted(NAMES)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got)


@pytest.mark.parametrize("alone", [False, True])
def test_a_handler_that_closes_the_iterator_and_raises(path: Path, alone: bool) -> None:
    """Without threads, too, where it runs within the reading."""
    done = run_script(
        """
        import signal, sys, weightload
        from weightload import _C
        _C.refuse_threads(sys.argv[2] == "alone")
        _C.arm_fault("delay", count=10**6, delay_ms=300)
        weights = weightload.safetensors_weights_iterator(sys.argv[1], to_cpu=True, backend="pread")
        def close(*_):
            weights.close()
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, close)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            list(weights)
        except KeyboardInterrupt:
            assert list(weights) == []
        else:
            sys.exit("the interrupt was lost")
        """,
        path,
        "alone" if alone else "threads",
    )
    assert done.returncode == 0, done.stderr


def _first(weights: Iterator[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    for pair in weights:
        return [pair]
    return []
