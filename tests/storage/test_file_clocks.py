"""File systems whose times move by themselves, or stand still: loads succeed, and what else tells a change does."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import fuse_clock
import pytest
import torch
from conftest import run_script, write_tensors

import weightload
from weightload import settings

pytestmark = pytest.mark.skipif(not fuse_clock.available(), reason="no FUSE file system can be mounted here")

KIB = 1 << 10
TENSORS = [(f"layer{i}", "F32", [8, KIB]) for i in range(8)]
CLOCKS = list(fuse_clock.CLOCKS)
Tensors = dict[str, torch.Tensor]


def _iterate(path: Path, **arguments: str) -> Tensors:
    return dict(weightload.safetensors_weights_iterator(path, to_cpu=True, show_progress=False, **arguments))  # type: ignore[arg-type]


def _into(path: Path) -> Tensors:
    target = {name: torch.zeros(shape) for name, _, shape in TENSORS}
    weightload.load_into(target, path, show_progress=False)
    return target


def _handle(path: Path) -> Tensors:
    with weightload.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _slices(path: Path) -> Tensors:
    with weightload.safe_open(path, "pt", backend="pread") as file:
        return {name: file.get_slice(name)[:] for name in file.keys()}  # noqa: SIM118


def _prefetched(path: Path) -> Tensors:
    with weightload.safe_open(path, "pt") as file:
        return dict(file.prefetch(dict.fromkeys(file.keys())))


WAYS: dict[str, Callable[[Path], Tensors]] = {
    "mmap": lambda path: _iterate(path, backend="mmap"),
    "pread": lambda path: _iterate(path, backend="pread"),
    "load_file": lambda path: weightload.load_file(path),
    "load_into": _into,
    "safe_open": _handle,
    "slices": _slices,
    "prefetch": _prefetched,
}


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = write_tensors(tmp_path / "backing", TENSORS)
    os.utime(path, (10**9, 10**9))
    return path


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("flags", ["", "direct", "cached,unnamed"])
def test_an_undisturbed_load_succeeds(clock: str, flags: str, backing: Path, tmp_path: Path) -> None:
    expected = weightload.load_file(backing)
    with fuse_clock.mounted(tmp_path / "mount", backing, clock, flags) as path, settings.override(task_bytes=16 * KIB):
        for way, load in WAYS.items():
            loaded = load(path)
            assert loaded.keys() == expected.keys(), way
            for name, tensor in loaded.items():
                assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), (way, name)
            del loaded, tensor  # views of the served file, whose server would wait for them


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _rename_a_tensor(path: Path) -> None:
    with path.open("r+b") as file:
        head = file.read(KIB)
        file.seek(0)
        file.write(head.replace(b"layer7", b"layer9"))


def _touch(path: Path) -> None:
    os.utime(path)


CHANGES = {"truncated": _truncate, "longer": _append, "another header": _rename_a_tensor}
NOTICED = [(clock, change, "direct") for clock in CLOCKS for change in CHANGES]
NOTICED += [("honest", "touched", "direct"), ("still", "another header", "direct,unnamed")]


@pytest.mark.parametrize(("clock", "change", "flags"), NOTICED)
def test_a_change_is_noticed(clock: str, change: str, flags: str, backing: Path, tmp_path: Path) -> None:
    with (
        fuse_clock.mounted(tmp_path / "mount", backing, clock, flags) as path,
        weightload.safe_open(path, "pt", backend="pread") as file,
    ):
        file.get_tensor("layer0")
        {**CHANGES, "touched": _touch}[change](backing)
        # The header is looked at for a part of the time only.
        deadline = time.monotonic() + 30
        for _ in range(2):  # and it stays so
            assert _refused(file, deadline) == str(path)


def _refused(file: weightload.safe_open, deadline: float) -> str | None:
    """The file that the error names; None where there is none. The error itself would keep the file open."""
    while time.monotonic() < deadline:
        try:
            file.get_tensor("layer0")
        except weightload.ReadError as error:
            return error.filename if re.search(r"was changed|ended .* early", str(error)) else str(error)
    return None


@pytest.mark.parametrize("clock", ["now", "still", "honest"])
def test_a_load_ends_with_the_change(clock: str, backing: Path, tmp_path: Path) -> None:
    options = {"task_bytes": 16 * KIB, "window_bytes": 32 * KIB, "block_bytes": 16 * KIB}
    with fuse_clock.mounted(tmp_path / "mount", backing, clock) as path, settings.override(**options):
        weights = weightload.safetensors_weights_iterator(path, to_cpu=True, backend="pread", show_progress=False)
        next(weights)
        _truncate(backing)
        with pytest.raises(weightload.ReadError):
            dict(weights)


REOPENED = """
import resource, sys, weightload
path, *others = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
with weightload.safe_open(path, "pt", backend="pread") as file:
    handles = [weightload.safe_open(other, "pt") for _ in range(40) for other in others]
    assert file.get_tensor("layer3").shape == (8, 1024)
"""


@pytest.mark.parametrize("clock", ["now", "still", "honest"])
def test_a_file_that_is_numbered_anew_is_opened_again(clock: str, backing: Path, tmp_path: Path) -> None:
    other = write_tensors(tmp_path / "other.safetensors", [("a", "U8", [1])])
    with fuse_clock.mounted(tmp_path / "mount", backing, clock, "renumbered") as path:
        done = run_script(REOPENED, path, other)
    assert done.returncode == 0, done.stderr
