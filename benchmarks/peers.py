"""The loaders that are compared: each a function from files to an iterator of (name, tensor on the device).

This file imports nothing but torch before a loader is called: each runs in a process of its own (loader_worker.py), which
must not hold the other loaders' libraries, or another version of its own. A loader that cannot work here raises
NotAvailableError, or whatever its library raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

Weights = Iterator[tuple[str, torch.Tensor]]
Load = Callable[[list[str], torch.device], Weights]
BASELINE = "safetensors"
# The folder with the release candidate, which would hide the safetensors of the environment if it were on the path.
CANDIDATE = "WEIGHTLOAD_SITE_RC"


class NotAvailableError(Exception):
    """A loader cannot be used here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A loader and what it needs."""

    load: Load
    package: str  # to install
    module: str  # to import
    only_cuda: bool = False
    path_variable: str | None = None  # environment variable with a folder to put first on the path


def safetensors(files: list[str], device: torch.device) -> Weights:
    """As people write it, with the tensors made on the device."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                yield name, opened.get_tensor(name)


def safetensors_load_file(files: list[str], device: torch.device) -> Weights:
    from safetensors.torch import load_file

    for file in files:
        yield from load_file(file, device=str(device)).items()


def fastvideo_style(files: list[str], device: torch.device) -> Weights:
    """Tensors made on the CPU, then moved one by one, as FastVideo's iterator does."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name).to(device)


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


def _fastsafetensors(files: list[str], device: torch.device, nogds: bool) -> Weights:
    loader = import_module("fastsafetensors").SafeTensorsFileLoader(None, device=str(device), nogds=nogds)
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


def fastsafetensors(files: list[str], device: torch.device) -> Weights:
    return _fastsafetensors(files, device, nogds=True)


def fastsafetensors_gds(files: list[str], device: torch.device) -> Weights:
    return _fastsafetensors(files, device, nogds=False)


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
    """What it recommends for files that may be in the page cache."""
    return instanttensor(files, device, backend=import_module("instanttensor").BackendPolicy.BUFFERED)


def runai_streamer(files: list[str], device: torch.device) -> Weights:
    """It reads into host memory, and moves each tensor from there with .to(device)."""
    with import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_files(list(files), device=str(device))
        yield from streamer.get_tensors()


def weightload(files: list[str], device: torch.device) -> Weights:
    import weightload

    return weightload.safetensors_weights_iterator(files, device=device, strategy="independent", show_progress=False)


def weightload_threads(threads: int) -> Load:
    def load(files: list[str], device: torch.device) -> Weights:
        from weightload import settings

        with settings.override(threads=threads):
            return weightload(files, device)

    return load


def _of_safetensors(load: Load) -> Peer:
    return Peer(load, "safetensors", "safetensors")


def _of_candidate(load: Load) -> Peer:
    return Peer(load, "safetensors", "safetensors", only_cuda=True, path_variable=CANDIDATE)


def _of_fastsafetensors(load: Load) -> Peer:
    return Peer(load, "fastsafetensors", "fastsafetensors")


def _of_instanttensor(load: Load) -> Peer:
    return Peer(load, "instanttensor", "instanttensor", only_cuda=True)


def _of_weightload(load: Load) -> Peer:
    return Peer(load, "weightload", "weightload")


# The slow ones last: where the time for a round runs out, the others have been measured.
PEERS: dict[str, Peer] = {
    BASELINE: _of_safetensors(safetensors),
    "weightload": _of_weightload(weightload),
    "safetensors 0.9 prefetch": _of_candidate(safetensors_prefetch),
    "safetensors 0.9 prefetch at once": _of_candidate(safetensors_prefetch_at_once),
    "fastsafetensors": _of_fastsafetensors(fastsafetensors),
    "fastsafetensors gds": dataclasses.replace(_of_fastsafetensors(fastsafetensors_gds), only_cuda=True),
    "fastsafetensors parallel": _of_fastsafetensors(fastsafetensors_parallel),
    "instanttensor": _of_instanttensor(instanttensor),
    "instanttensor buffered": _of_instanttensor(instanttensor_buffered),
    "run:ai streamer": Peer(runai_streamer, "runai-model-streamer", "runai_model_streamer"),
    "safetensors load_file": _of_safetensors(safetensors_load_file),
    "fastvideo style": _of_safetensors(fastvideo_style),
}
SWEEP = {f"weightload {n} threads": _of_weightload(weightload_threads(n)) for n in (8, 16, 32)}


def find(name: str) -> Peer:
    """A peer by name, or the function of a file of your own: ``path/to/file.py:function``."""
    if name in PEERS | SWEEP:
        return (PEERS | SWEEP)[name]
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_loader", path)
    if not path.endswith(".py") or spec is None or spec.loader is None:
        raise SystemExit(f"no such loader: {name!r}; there are {', '.join(PEERS | SWEEP)}, and FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Peer(getattr(module, function), "", "torch")


def environment(peer: Peer) -> dict[str, str]:
    """The environment of the peer's process."""
    found = dict(os.environ)
    if peer.path_variable and found.get(peer.path_variable):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (found[peer.path_variable], found.get("PYTHONPATH"))))
    return found


def missing(peer: Peer, device: torch.device) -> str | None:
    """Why the peer cannot be tried here, as far as one can tell without starting it."""
    if peer.only_cuda and device.type != "cuda":
        return "only for CUDA devices"
    if peer.path_variable and not os.environ.get(peer.path_variable):
        return f"{peer.path_variable} does not name the folder that it is installed in"
    if importlib.util.find_spec(peer.module) is None:
        return f"{peer.package} is not installed"
    return None
