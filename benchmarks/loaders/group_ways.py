"""The ways in which the ranks of a group can load one checkpoint: as people write it in Python, and weightload's.

A way is a function of a ``Place`` that gives an iterator of (name, tensor), on every rank all tensors of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open

import weightload
from weightload._base.dtypes import TORCH_DTYPES, torch_shape

Weights = Iterator[tuple[str, torch.Tensor]]
BASELINE = "python broadcast"

# safetensors knows its devices by name; to others a tensor goes by way of the CPU.
KNOWN_DEVICES = ("cpu", "cuda", "xpu", "npu", "hpu", "mps")
# Dtypes that gloo and NCCL both can move. Others travel as bytes, which costs the same.
MOVABLE = (torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class Place:
    """The files, the device and the group of a load."""

    files: list[str]
    device: torch.device
    group: dist.ProcessGroup | None
    """None: all ranks."""


Way = Callable[[Place], Weights]


def _read(opened: Any, name: str, device: torch.device) -> torch.Tensor:
    """A tensor of a file; on the CPU a view of the mapped file."""
    tensor: torch.Tensor = opened.get_tensor(name)
    return tensor.to(device)


def _opened(file: str, device: torch.device) -> Any:
    return safe_open(file, framework="pt", device=str(device) if device.type in KNOWN_DEVICES else "cpu")


def python_independent(place: Place) -> Weights:
    """Every rank reads everything, on the CPU into private memory as the ways that share the reading do."""
    for file in place.files:
        with _opened(file, place.device) as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                tensor = _read(opened, name, place.device)
                yield name, tensor.clone() if place.device.type == "cpu" else tensor


def _empty(opened: Any, name: str, device: torch.device) -> torch.Tensor:
    """Memory for a tensor that another rank reads."""
    described = opened.get_slice(name)
    dtype = described.get_dtype()
    return torch.empty(torch_shape(dtype, tuple(described.get_shape())), dtype=TORCH_DTYPES[dtype], device=device)


def _broadcast(tensor: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool) -> Any:
    """Broadcast from the group's first rank; the answer of an asynchronous one is to be waited for."""
    if tensor.numel() == 0:  # every rank knows, and has it already
        return None
    if tensor.dtype not in MOVABLE:
        tensor = tensor.reshape(-1).view(torch.uint8)
    return dist.broadcast(tensor, group=group, group_src=0, async_op=async_op)


def python_broadcast(place: Place, async_op: bool = False) -> Weights:
    """The first rank reads, tensor by tensor; the others open the same files for shapes and dtypes and receive.

    ``async_op`` starts all broadcasts of a file before it waits for them at the end of the file.
    """
    reads = dist.get_rank(place.group) == 0
    for file in place.files:
        arriving: list[tuple[str, torch.Tensor, Any]] = []
        with _opened(file, place.device) as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = (_read if reads else _empty)(opened, name, place.device)
                handle = _broadcast(tensor, place.group, async_op)
                if async_op:
                    arriving.append((name, tensor, handle))
                else:
                    yield name, tensor
            for name, tensor, handle in arriving:
                if handle is not None:
                    handle.wait()
                yield name, tensor


def ours(place: Place, strategy: str, backend: Literal["mmap", "pread"] = "mmap") -> Weights:
    return weightload.safetensors_weights_iterator(
        place.files,
        device=place.device,
        group=place.group,
        strategy=strategy,
        backend=backend,
        show_progress=False,
    )


def python_mapped(place: Place) -> Weights:
    """Every rank maps the files for itself, as FastVideo's iterator does with to_cpu=True."""
    for file in place.files:
        with _opened(file, place.device) as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, _read(opened, name, place.device)


def fastsafetensors_broadcast(place: Place) -> Weights:
    """Its pipeline: each rank reads the files of its turn, and broadcasts what it has read."""
    library = import_module("fastsafetensors")
    # Its nogds readers past the page cache are told otherwise by the environment.
    loader = library.ParallelLoader(
        place.group, list(place.files), use_tqdm_on_load=False, device=str(place.device), nogds=True
    )
    try:
        with contextlib.closing(loader.iterate_weights()) as weights:
            yield from weights
    finally:
        loader.close()


def runai_distributed(place: Place) -> Weights:
    """Each rank reads a share and broadcasts it through its own staging buffers; what it yields is a copy."""
    with import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_files(list(place.files), device=str(place.device), is_distributed=True)
        if not streamer.file_streamer.is_distributed:
            raise RuntimeError("it does not distribute the reading over this group")
        yield from streamer.get_tensors()


WAYS: dict[str, Way] = {
    "python independent": python_independent,
    BASELINE: python_broadcast,
    "python async broadcast": partial(python_broadcast, async_op=True),
    "weightload independent": partial(ours, strategy="independent"),
    "weightload independent pread": partial(ours, strategy="independent", backend="pread"),
    "weightload broadcast": partial(ours, strategy="broadcast"),
    "weightload striped": partial(ours, strategy="striped"),
    "weightload auto": partial(ours, strategy="auto"),
}
# Only where they are named: each needs a package, those of the loaders of peers.py.
MORE_WAYS: dict[str, Way] = {
    "python mapped": python_mapped,
    "fastsafetensors broadcast": fastsafetensors_broadcast,
    "run:ai distributed": runai_distributed,
}
PEER_WAYS = {"fastsafetensors broadcast": "fastsafetensors buffered", "run:ai distributed": "run:ai streamer buffered"}
CPU_ONLY = ("weightload independent pread",)  # on an accelerator memory is private in any case


def ways_for(device: torch.device, names: list[str] | None) -> dict[str, Way]:
    """The ways that exist for a device, or those named."""
    every = WAYS | MORE_WAYS
    unknown = sorted(set(names or ()) - set(every))
    if unknown:
        raise ValueError(f"no such way: {', '.join(unknown)}; there are: {', '.join(every)}")
    return {
        name: way
        for name, way in (WAYS if names is None else every).items()
        if (names is None or name in names) and (device.type == "cpu" or name not in CPU_ONLY)
    }
