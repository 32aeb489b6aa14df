"""Every way into the library that reads files, for the tests of bad input, changing files, faults and limits."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import open_checkpoints, thread_count

import weightload
from support.simulated import DEVICE
from weightload._base.dtypes import TORCH_DTYPES, torch_shape

Bytes = dict[str, bytes]
Way = Callable[[list[Path]], Bytes]

# A target to load into where the file cannot be asked for its tensors.
ANY_TARGET = {"a": torch.zeros(1, dtype=torch.uint8)}
# Small enough for several tasks, slots and blocks in a file of 200 kB.
TINY: dict[str, Any] = {
    "task_bytes": 32 << 10,
    "block_bytes": 64 << 10,
    "window_bytes": 64 << 10,
    "slot_bytes": 32 << 10,
    "pinned_bytes": 128 << 10,
    "device_block_bytes": 64 << 10,
    "threads": 2,
}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> Bytes:
    return {name: raw_bytes(tensor) for name, tensor in tensors.items()}


def content(*paths: Path) -> Bytes:
    """Return what the files hold, as safetensors reads it."""
    return bytes_of({name: tensor for path in paths for name, tensor in safetensors.torch.load_file(path).items()})


def iterate(paths: list[Path], **options: Any) -> Bytes:
    return bytes_of(dict(weightload.safetensors_weights_iterator(paths, **options)))


def load_files(paths: list[Path], **options: Any) -> Bytes:
    tensors = {}
    for path in paths:
        tensors.update(weightload.load_file(path, **options))
    return bytes_of(tensors)


def get_tensors(paths: list[Path], **options: Any) -> Bytes:
    """One by one; handles are opened before, as one does with shards."""
    handles = [weightload.safe_open(path, **options) for path in paths]
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        return bytes_of({name: handle.get_tensor(name) for handle in handles for name in handle.offset_keys()})


def halves(paths: list[Path], **options: Any) -> Bytes:
    """Each tensor as two slices of its rows."""
    result = {}
    for path in paths:
        with weightload.safe_open(path, **options) as handle:
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                middle = (part.get_shape() or [0])[0] // 2
                two = [part[:middle], part[middle:]] if part.get_shape() else [part[()]]
                result[name] = b"".join(map(raw_bytes, two))
    return result


def prefetched(paths: list[Path], **options: Any) -> Bytes:
    tensors = {}
    for path in paths:
        with weightload.safe_open(path, **options) as handle, handle.prefetch() as loader:
            tensors.update(loader)
    return bytes_of(tensors)


def ones_like(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file's names, shapes and dtypes. Reads the header past the library, whose reads tests count."""
    if not 8 < path.stat().st_size < 10**7:
        return {}
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {
        name: torch.ones(torch_shape(info["dtype"], tuple(info["shape"])), dtype=torch.uint8).to(
            TORCH_DTYPES[info["dtype"]]
        )
        for name, info in header.items()
        if name != "__metadata__" and info["data_offsets"][1] < 10**7
    }


def load_into(paths: list[Path], device: str = "cpu") -> Bytes:
    """Into tensors of ones, of the shapes that the files' headers have where those can be read."""
    target = {name: tensor.to(device) for name, tensor in ANY_TARGET.items()}
    for path in paths:
        with contextlib.suppress(Exception):  # of files that are no such files
            target |= {name: tensor.to(device) for name, tensor in ones_like(path).items()}
    report = weightload.load_into(target, paths, strict=False)
    return bytes_of({name: target[name] for name in report.loaded})


CPU_WAYS: dict[str, Way] = {
    "iterator-mmap": lambda paths: iterate(paths, to_cpu=True, backend="mmap"),
    "iterator-pread": lambda paths: iterate(paths, to_cpu=True, backend="pread"),
    "load_file-mmap": lambda paths: load_files(paths, backend="mmap"),
    "load_file-pread": lambda paths: load_files(paths, backend="pread"),
    "load_into": load_into,
    "safe_open-mmap": lambda paths: get_tensors(paths, backend="mmap"),
    "safe_open-pread": lambda paths: get_tensors(paths, backend="pread"),
    "slices-pread": lambda paths: halves(paths, backend="pread"),
    "prefetch-mmap": lambda paths: prefetched(paths, backend="mmap"),
    "prefetch-pread": lambda paths: prefetched(paths, backend="pread"),
}
SIMULATED_WAYS: dict[str, Way] = {
    "simulated-iterator": lambda paths: iterate(paths, device=DEVICE),
    "simulated-load_file": lambda paths: load_files(paths, device=DEVICE),
    "simulated-safe_open": lambda paths: get_tensors(paths, device=DEVICE),
    "simulated-prefetch": lambda paths: prefetched(paths, device=DEVICE),
    "simulated-load_into": lambda paths: load_into(paths, DEVICE),
}
WAYS = [*CPU_WAYS, *(pytest.param(name, marks=pytest.mark.simulated) for name in SIMULATED_WAYS)]
# Ways that hand out memory of the reader's own, whatever becomes of the file.
PRIVATE_WAYS = [way for way in WAYS if "mmap" not in str(way)]


def way_of(request: pytest.FixtureRequest) -> Way:
    """The way that a test was parametrized with by name; those to the simulated accelerator with it there."""
    name = request.param
    if name in SIMULATED_WAYS:
        request.getfixturevalue("simulated")
        return SIMULATED_WAYS[name]
    return CPU_WAYS[name]


def assert_nothing_held() -> None:
    """No thread, no descriptor. Right after a failed load, with the exception gone."""
    assert thread_count() == 0
    assert open_checkpoints() == []


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))
