"""load_file and load: whole files at once, with safetensors' names and meanings."""

from __future__ import annotations

import torch

from weightload import _C
from weightload._base.paths import Path, path_list
from weightload._checkpoint.selection import open_files, select_all
from weightload._group.cached import cache_of, require_cache, using
from weightload._load import devices
from weightload._load.device_iterator import bytes_of_files, load_to_device
from weightload._load.fetch import load_all
from weightload._load.iterator import Backend, WeightIterator
from weightload._load.options import device_of


def load_file(
    filename: Path, device: devices.Device = "cpu", *, backend: Backend = "mmap", cache: Path | None = None
) -> dict[str, torch.Tensor]:
    """Load every tensor of a file into a dict, ordered by offset.

    Args:
        filename: path of the safetensors file.
        device: the CPU, or an accelerator as for ``safetensors_weights_iterator``.
        backend: ``"mmap"``: copy-on-write views of the mapped file. Its bytes are read before this returns, unless
            the file would not fit comfortably into memory (half of what is available); then they are read as they
            are touched. ``"pread"``: private memory. On an accelerator memory is always private.
        cache: a folder for copies of what servers have, as for ``safetensors_weights_iterator``.

    Raises:
        FileNotFoundError, HeaderError, ReadError, TensorError, OutOfMemoryError, CacheError: as
            ``safetensors_weights_iterator``.
        OptionError: (``ValueError``, ``SafetensorError`` and ``RuntimeError``) a device that torch cannot use here, or
            no such backend.
    """
    target = device_of(device, backend)
    folder = require_cache(cache)
    copies = cache_of(folder, path_list(filename), fill=True) if folder is not None else None
    with using(copies):
        if target.type != "cpu":
            most = bytes_of_files([filename])
            return dict(load_to_device(target, most, [filename], lambda: open_files([filename], copies), None))
        return load_all(open_files([filename], copies)[0], target, backend)


def load(data: bytes | bytearray | memoryview, device: devices.Device = "cpu") -> dict[str, torch.Tensor]:
    """Load every tensor of a safetensors file that is in memory into a dict of tensors with their own memory.

    Args:
        data: the whole file.
        device: the CPU, or an accelerator as for ``safetensors_weights_iterator``.

    Raises:
        HeaderError: the bytes break a rule of the format; the subclass names the rule.
        TensorError: torch lacks a tensor's dtype.
        OutOfMemoryError: as ``safetensors_weights_iterator``.
        OptionError: as ``load_file``.
        TypeError: not bytes, nor anything that has bytes.
    """
    target = device_of(device)
    # An object that can change under the reading threads is copied first.
    file = _C.from_bytes(data if isinstance(data, bytes) else bytes(memoryview(data)))
    if target.type != "cpu":
        return dict(load_to_device(target, len(data), [""], lambda: [file], None))
    return dict(WeightIterator([file], select_all([file], None), backend="pread", read_ahead=True))
