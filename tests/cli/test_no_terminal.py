"""Loads where nobody watches: a stderr that is missing, closed, unlike others, or fails on the way."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tensors

import weightload
from weightload._base import terminal
from weightload.cli import main as cli


class Failing(io.StringIO):
    """A terminal that went away."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")  # tqdm itself forgives only some

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file")


class OnlyWrites:
    """A stream that can only write, like those of Ray, notebooks and log redirections."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


class FailsLater(OnlyWrites):
    """A pipe whose reader ends on the way."""

    def write(self, text: str) -> int:
        if self.text:
            raise OSError(28, "No space left on device")
        return super().write(text)


class IsattyRaises(io.StringIO):
    def isatty(self) -> bool:
        raise RuntimeError("detached")


class Nothing:
    """No stream at all."""


class Strange:
    """A stream of which every attribute raises."""

    def __getattribute__(self, name: str) -> Any:
        raise ReferenceError(name)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "closed": closed,
    "no isatty": OnlyWrites,
    "isatty raises": IsattyRaises,
    "writing fails": Failing,
    "writing fails later": FailsLater,
    "no stream": Nothing,
    "attributes raise": Strange,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tensors(tmp_path / "m.safetensors", [(str(i), "U8", [100]) for i in range(20)])


def iterate(path: Path, **options: Any) -> int:
    return len(dict(weightload.safetensors_weights_iterator(path, to_cpu=True, **options)))


def into(path: Path, **options: Any) -> int:
    target = {str(i): torch.zeros(100, dtype=torch.uint8) for i in range(20)}
    return len(weightload.load_into(target, path, **options).loaded)


CALLS = pytest.mark.parametrize("call", [iterate, into])


@CALLS
@pytest.mark.parametrize("options", [{}, {"show_progress": None}, {"show_progress": True}, {"show_progress": False}])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_load_needs_no_terminal(
    path: Path, stream: str, options: dict[str, Any], call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", STREAMS[stream]())
    assert call(path, **options) == 20


@CALLS
def test_a_bar_where_it_can_be_written(path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = OnlyWrites()
    monkeypatch.setattr(sys, "stderr", stream)
    assert call(path) == 20
    assert stream.text == ""
    assert call(path, show_progress=True) == 20
    assert "2.00k/2.00k" in stream.text


def test_a_stderr_that_is_closed_on_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in ("closed", "None"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        weights = weightload.safetensors_weights_iterator(path, to_cpu=True, show_progress=True)
        next(weights)
        stream.close()
        if ending == "None":
            monkeypatch.setattr(sys, "stderr", None)
        assert len(list(weights)) == 19
        weights.close()


@CALLS
def test_a_bar_that_cannot_be_made(path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook without widgets, or no tqdm."""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert call(path, show_progress=True) == 20


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- >&-"])
def test_a_process_without_stderr(path: Path, redirection: str) -> None:
    script = textwrap.dedent("""
        import os, sys, torch, weightload
        for asked in (None, True):
            assert len(list(weightload.safetensors_weights_iterator(sys.argv[1], True, show_progress=asked))) == 20
            target = {str(i): torch.zeros(100, dtype=torch.uint8) for i in range(20)}
            assert len(weightload.load_into(target, sys.argv[1], show_progress=asked).loaded) == 20
        os._exit(7)
    """)
    command = ["sh", "-c", f'"$0" -c "$1" "$2" {redirection}', sys.executable, script, str(path)]
    assert subprocess.run(command, timeout=120).returncode == 7


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- >&-"])
@pytest.mark.parametrize("there", [True, False])
def test_the_command_without_stderr(path: Path, redirection: str, there: bool) -> None:
    """Keeps its exit code, and says on stdout only what belongs there."""
    write_tensors(path.with_name("model.safetensors"), [("a", "U8", [1])])
    command = ["sh", "-c", f'"$0" -m weightload inspect "$1" {redirection}', sys.executable]
    where = path.parent if there else path.parent / "none"
    done = subprocess.run([*command, str(where)], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if there else 3)
    assert ("total" in done.stdout) is (there and ">&- >&-" not in f"{redirection}"[1:])
    assert "weightload:" not in done.stdout


def test_the_command_in_this_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in STREAMS.values():
        monkeypatch.setattr(sys, "stderr", make())
        assert cli.main(["inspect", str(path.parent / "none")]) == 3
        assert not terminal.is_terminal(sys.stderr) or isinstance(sys.stderr, Failing)
