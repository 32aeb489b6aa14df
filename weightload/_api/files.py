"""load_file and load: whole files at once, with safetensors' names and meanings."""

from __future__ import annotations

import functools

import torch

from weightload import _C
from weightload._base.paths import Path, as_text
from weightload._checkpoint.selection import Opening, open_files
from weightload._group.cached import cache_of, require_cache, using
from weightload._load import devices
from weightload._load.fetch import load_all
from weightload._load.options import Backend, device_of
from weightload._load.start import Reading, Source, start
from weightload._verify.checking import checked
from weightload._verify.digests import Verify, require_verify


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
    require_verify(verify)
    folder = require_cache(cache)
    name = as_text(filename)
    copies = cache_of(folder, [name], fill=True, at_end=verify is not None)

    def load_it(open_it: Opening) -> dict[str, torch.Tensor]:
        if target.type == "cpu":
            return load_all(open_it()[0], target, backend)
        return dict(start(Source([name], open_it), target))

    with using(copies):
        return checked(name, verify, functools.partial(open_files, [name], copies), load_it)


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
    return dict(start(Source.of([file]), target, reading=Reading("pread")))
