"""The ways in which the ranks of a group can load one checkpoint: as people write it in Python, and weightload's.

A way is a function of a ``Place`` that gives an iterator of (name, tensor), on every rank all tensors of the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open

import weightload
from weightload.dtypes import TORCH_DTYPES, torch_shape

Weights = Iterator[tuple[str, torch.Tensor]]
BASELINE = "python broadcast"

# safetensors knows its devices by name; to others a tensor goes by way of the CPU.
KNOWN_DEVICES = ("cpu", "cuda", "xpu", "npu", "hpu", "mps")
# What gloo and NCCL both can move. Other dtypes travel as bytes, which costs the same.
MOVABLE = (torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class Place:
    """What is loaded, where to, and by whom together."""

    files: list[str]
    device: torch.device
    group: dist.ProcessGroup


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


def _broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool) -> Any:
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
CPU_ONLY = ("weightload independent pread",)  # on an accelerator memory is private in any case


def ways_for(device: torch.device, names: list[str] | None) -> dict[str, Way]:
    """The ways that exist for a device, or those named."""
    unknown = sorted(set(names or ()) - set(WAYS))
    if unknown:
        raise ValueError(f"no such way: {', '.join(unknown)}; there are: {', '.join(WAYS)}")
    return {
        name: way
        for name, way in WAYS.items()
        if (names is None or name in names) and (device.type == "cpu" or name not in CPU_ONLY)
    }
