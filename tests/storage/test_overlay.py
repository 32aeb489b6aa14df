"""overlayfs, on which containers have their files: what is in the page cache is in that of the file below."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import evict, write_tensors
from support.simulated import DEVICE

import weightload
from weightload import _C, settings

MIB = 1 << 20


@pytest.fixture
def overlaid(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint in a lower layer, as it is seen through the mount."""
    lower, other, merged = (tmp_path / name for name in ("lower", "other", "merged"))
    for folder in (lower, other, merged):
        folder.mkdir()
    path = write_tensors(lower / "x.safetensors", [(str(i), "F32", [MIB]) for i in range(6)])
    with path.open("rb") as file:
        os.fsync(file)  # overlayfs writes nothing of lower layers back, and dirty pages cannot be evicted
    options = f"lowerdir={other}:{lower}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("overlayfs cannot be mounted here")
    try:
        yield merged / "x.safetensors"
    finally:
        subprocess.run(["umount", "--lazy", str(merged)], check=True)


def test_what_is_cached_is_known(overlaid: Path) -> None:
    evict([overlaid])
    assert _C.resident_bytes(os.fsencode(overlaid)) == 0
    overlaid.read_bytes()
    assert _C.resident_bytes(os.fsencode(overlaid)) == overlaid.stat().st_size


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_cold_and_warm_loads(overlaid: Path, backend: str) -> None:
    whole = weightload.load_file(overlaid.parent.parent / "lower" / "x.safetensors")
    for cold in (True, False):
        if cold:
            evict([overlaid])
        with settings.override(task_bytes=MIB):
            loaded = dict(weightload.safetensors_weights_iterator(overlaid, to_cpu=True, backend=backend))
        for name, tensor in whole.items():
            assert torch.equal(loaded[name].view(torch.int32), tensor.view(torch.int32))


def test_warm_pages_are_mapped_without_reading_them(overlaid: Path) -> None:
    overlaid.read_bytes()
    _C.arm_fault("delay", first=1 << 60)  # counts calls, and hits none
    try:
        with settings.override(task_bytes=MIB, threads=1):
            list(weightload.safetensors_weights_iterator(overlaid, to_cpu=True))
        calls = _C.reads_since_armed()
    finally:
        _C.disarm_fault()
    assert calls <= 2 + 25, "the header, and one call a task: nothing is read beside populating"


def test_to_an_accelerator(simulated: object, overlaid: Path) -> None:
    overlaid.read_bytes()
    weights = weightload.safetensors_weights_iterator(overlaid, device=DEVICE, strategy="independent")
    assert len(list(weights)) == 6
    assert weights.stats().direct_bytes == 0, "in memory already"
