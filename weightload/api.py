"""load_file and load: whole files at once, with safetensors' names and meanings."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from weightload import _C
from weightload.iterator import Backend, WeightIterator, open_files, require_cpu


def load_file(
    filename: str | os.PathLike[str], device: str | int | torch.device = "cpu", *, backend: Backend = "mmap"
) -> dict[str, torch.Tensor]:
    """Load every tensor of a file into a dict, ordered by offset.

    Args:
        filename: path of the safetensors file.
        device: only the CPU is implemented.
        backend: ``"mmap"``: copy-on-write views of the mapped file. Its bytes are read before this returns, unless
            the file would not fit comfortably into memory (half of what is available); then they are read as they
            are touched. ``"pread"``: private memory.

    Raises:
        FileNotFoundError, HeaderError, ReadError, TensorError: as ``safetensors_weights_iterator``.
        NotImplementedError: a device other than the CPU.
    """
    require_cpu(device)
    files = open_files([filename])
    read_ahead = files[0].size <= available_memory() // 2
    return dict(WeightIterator(files, None, backend=backend, read_ahead=read_ahead))


def load(data: bytes) -> dict[str, torch.Tensor]:
    """Load every tensor of a safetensors file that is in memory into a dict of CPU tensors with their own memory.

    Args:
        data: the whole file.

    Raises:
        HeaderError: the bytes break a rule of the format; the subclass names the rule.
        TensorError: torch lacks a tensor's dtype.
    """
    # An object that can change under the reading threads is copied first.
    file = _C.from_bytes(data if isinstance(data, bytes) else bytes(data))
    return dict(WeightIterator([file], None, backend="pread", read_ahead=True))


def available_memory() -> int:
    """Bytes that can be had without swapping (MemAvailable of /proc/meminfo); 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
