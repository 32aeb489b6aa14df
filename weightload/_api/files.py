"""load_file and load: whole files at once, with safetensors' names and meanings."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from weightload import _C
from weightload._base.paths import Path, as_text
from weightload._checkpoint.digests import Verify, require_verify
from weightload._checkpoint.selection import open_files, select_all
from weightload._group.cached import cache_of, require_cache, using
from weightload._load import devices
from weightload._load.checking import Checking
from weightload._load.device_iterator import bytes_of_files, load_to_device
from weightload._load.fetch import load_all
from weightload._load.iterator import Backend, WeightIterator
from weightload._load.options import device_of


def load_file(
    filename: Path,
    device: devices.Device = "cpu",
    *,
    backend: Backend = "mmap",
    verify: Verify | None = None,
    cache: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Load every tensor of a file into a dict, ordered by offset.

    Args:
        filename: path of the safetensors file.
        device: the CPU, or an accelerator as for ``safetensors_weights_iterator``.
        backend: ``"mmap"``: copy-on-write views of the mapped file. Its bytes are read before this returns, unless
            the file would not fit comfortably into memory (half of what is available); then they are read as they
            are touched. ``"pread"``: private memory. On an accelerator memory is always private.
        verify: check the file's SHA-256 while it is loaded, as for ``safetensors_weights_iterator``: nothing is
            returned of a file that has another.
        cache: a folder for copies of what servers have, as for ``safetensors_weights_iterator``.

    Raises:
        FileNotFoundError, HeaderError, ReadError, TensorError, OutOfMemoryError, CacheError: as
            ``safetensors_weights_iterator``.
        OptionError: (``ValueError``, ``SafetensorError`` and ``RuntimeError``) a device that torch cannot use here, or
            no such backend.
        ChecksumError: ``verify``: the file has another digest. CheckpointError: none is known. ValueError, TypeError:
            a ``verify`` that is none.
    """
    target = device_of(device, backend)
    if verify is not None:
        require_verify(verify)
    folder = require_cache(cache)
    name = as_text(filename)
    copies = cache_of(folder, [name], fill=True, at_end=verify is not None) if folder is not None else None
    open_it = functools.partial(open_files, [filename], copies)
    with using(copies):
        if verify is None:
            return _load_file(filename, target, backend, open_it)
        checking = Checking([name], verify)
        return checking.run(lambda: _load_file(filename, target, backend, checking.opening(open_it)))


def _load_file(
    filename: Path, device: torch.device, backend: Backend, open_it: Callable[[], list[_C.CheckpointFile]]
) -> dict[str, torch.Tensor]:
    if device.type != "cpu":
        return dict(load_to_device(device, bytes_of_files([filename]), [filename], open_it, None))
    return load_all(open_it()[0], device, backend)


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
