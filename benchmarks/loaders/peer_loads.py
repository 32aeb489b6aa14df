"""How each loader is called: functions from files to an iterator of (name, tensor on the device).

This file imports nothing but torch before a loader is called: each runs in a process of its own (loaders/worker.py),
which must not hold the other loaders' libraries, or another version of its own. A loader that cannot work here raises
NotAvailableError, or whatever its library raises.

Each is called as its own documentation shows. Where that leaves a choice, the choices are loaders of their own in
peers.py, and each loader's best one counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

Weights = Iterator[tuple[str, torch.Tensor]]
Load = Callable[[list[str], torch.device], Weights]


class NotAvailableError(Exception):
    """A loader cannot be used here; the text says why."""


def safetensors(files: list[str], device: torch.device, backend: str = "mmap") -> Weights:
    """Load as people do, tensors made on the device. FastVideo's iterator does the same when it does not broadcast."""
    from safetensors import safe_open

    # safetensors before 0.8 has no backend.
    options = {} if backend == "mmap" else {"backend": backend}
    for file in files:
        with safe_open(file, framework="pt", device=str(device), **options) as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                yield name, opened.get_tensor(name)


def safetensors_clone(files: list[str], device: torch.device) -> Weights:
    """Views of the mapped file, each copied into memory of its own."""
    for name, tensor in safetensors(files, device):
        yield name, tensor.clone()


def safetensors_pread(files: list[str], device: torch.device) -> Weights:
    return safetensors(files, device, backend="pread")


def safetensors_load_file(files: list[str], device: torch.device, **options: Any) -> Weights:
    from safetensors.torch import load_file

    for file in files:
        yield from load_file(file, device=str(device), **options).items()


def safetensors_load_file_pread(files: list[str], device: torch.device) -> Weights:
    return safetensors_load_file(files, device, backend="pread")


def fastvideo_style(files: list[str], device: torch.device) -> Weights:
    """Tensors made on the CPU, then moved one by one."""
    for name, tensor in safetensors(files, torch.device("cpu")):
        yield name, tensor.to(device)


def _prefetch(files: list[str], device: torch.device, at_once: int) -> Weights:
    from safetensors import safe_open

    if not hasattr(safe_open, "prefetch"):
        raise NotAvailableError("this safetensors has no prefetch")
    with contextlib.ExitStack() as stack:
        waiting = []
        for number in range(len(files) + at_once - 1):
            if number < len(files):
                opened = stack.enter_context(safe_open(files[number], framework="pt", device=str(device)))
                waiting.append(stack.enter_context(opened.prefetch()))
            if number >= at_once - 1:
                yield from waiting.pop(0)


def safetensors_prefetch(files: list[str], device: torch.device) -> Weights:
    """A file after the other."""
    return _prefetch(files, device, 1)


def safetensors_prefetch_at_once(files: list[str], device: torch.device) -> Weights:
    """All files started before the first is drained."""
    return _prefetch(files, device, len(files))


def fastsafetensors(files: list[str], device: torch.device, nogds: bool = True, **options: Any) -> Weights:
    """All files at once; what it yields may be kept: "no clone is required"."""
    loader = import_module("fastsafetensors").SafeTensorsFileLoader(None, device=str(device), nogds=nogds, **options)
    try:
        used = loader.copier_class.__name__
        if not nogds and not used.startswith("Gds"):
            raise NotAvailableError(f"no GPUDirect Storage here, it falls back to {used}")
        loader.add_filenames({0: list(files)})
        buffers = loader.copy_files_to_device()
        try:
            for name in loader.get_keys():
                yield name, buffers.get_tensor(name)
        finally:
            buffers.close()  # the tensors keep their memory
    finally:
        loader.close()


def fastsafetensors_gds(files: list[str], device: torch.device) -> Weights:
    return fastsafetensors(files, device, nogds=False)


def fastsafetensors_large_buffers(files: list[str], device: torch.device) -> Weights:
    """Its documentation's example of 8 workers with 16 slots of 16 MiB, where the default is 16 with 512 KiB."""
    return fastsafetensors(files, device, max_threads=8, bbuf_size_kb=256 << 10)


def fastsafetensors_parallel(files: list[str], device: torch.device) -> Weights:
    """Its pipeline of files, which yields copies."""
    library = import_module("fastsafetensors")
    loader = library.ParallelLoader(None, list(files), use_tqdm_on_load=False, device=str(device), nogds=True)
    try:
        with contextlib.closing(loader.iterate_weights()) as weights:
            yield from weights
    finally:
        loader.close()


def instanttensor(files: list[str], device: torch.device, **options: Any) -> Weights:
    """Its default: past the page cache on disks."""
    library = import_module("instanttensor")
    with library.safe_open(list(files), framework="pt", device=str(device), **options) as opened:
        yield from opened.tensors()


def instanttensor_buffered(files: list[str], device: torch.device) -> Weights:
    """The settings that it recommends for files that may be in the page cache."""
    return instanttensor(files, device, backend=import_module("instanttensor").BackendPolicy.BUFFERED)


def runai_streamer(files: list[str], device: torch.device) -> Weights:
    """All files at once. Since 0.17 what it yields may be kept (owned=True is its default), so nothing is cloned."""
    with import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_files(list(files), device=str(device))
        yield from streamer.get_tensors()


def weightload(files: list[str], device: torch.device, **options: Any) -> Weights:
    import weightload

    return weightload.safetensors_weights_iterator(
        files, device=device, strategy="independent", show_progress=False, **options
    )


def weightload_pread(files: list[str], device: torch.device) -> Weights:
    return weightload(files, device, backend="pread")


def weightload_load_file(files: list[str], device: torch.device, **options: Any) -> Weights:
    from weightload import load_file

    for file in files:
        yield from load_file(file, device=device, **options).items()


def weightload_load_file_pread(files: list[str], device: torch.device) -> Weights:
    return weightload_load_file(files, device, backend="pread")


def weightload_threads(threads: int) -> Load:
    def load(files: list[str], device: torch.device) -> Weights:
        from weightload import settings

        with settings.override(threads=threads):
            return weightload(files, device)

    return load
