"""torch's modes, contexts and defaults change nothing in a load to an accelerator; see test_torch_modes.py."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tensors
from support.simulated import DEVICE, SMALL
from support.torch_modes import MODES, described, look_around, undisturbed

import weightload
from weightload import settings

pytestmark = pytest.mark.simulated

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors on both sides of what the pipeline takes over."""
    tensors = [
        ("large", "F32", [900, 700]), ("small", "I16", [40, 3]), ("bool", "BOOL", [70, 20]), ("one", "F64", []),
        ("empty", "F32", [0, 3]), ("packed", "F4", [3000, 800]),
    ]  # fmt: skip
    return write_tensors(tmp_path_factory.mktemp("modes") / "m.safetensors", tensors)


def iterated(path: Path) -> Tensors:
    here, got = look_around(), {}
    for name, tensor in weightload.safetensors_weights_iterator([path], device=DEVICE):
        assert look_around() == here
        got[name] = tensor
    return got


def each_tensor(path: Path) -> Tensors:
    with weightload.safe_open(path, device=DEVICE) as file:
        return {name: file.get_tensor(name) for name in file}


ROWS = [slice(None), slice(3, 39), slice(0, None, 7), -1, (slice(2, 30), slice(1, 3)), [3, 1], torch.tensor([2])]

ROWS_OF_PACKED = [slice(1, 2990), slice(None, None, 300), 5, slice(7, 9)]  # torch has no other of its dtype


def slices(path: Path) -> Tensors:
    with weightload.safe_open(path, device=DEVICE) as file:
        got = {f"packed {n}": file.get_slice("packed")[at] for n, at in enumerate(ROWS_OF_PACKED)}
        for name in ("large", "small", "bool"):
            got.update({f"{name} {n}": file.get_slice(name)[at] for n, at in enumerate(ROWS)})
        return got


def prefetched(path: Path) -> Tensors:
    with weightload.safe_open(path) as file, file.prefetch({"large": slice(9, 800), "one": None}, device=DEVICE) as got:
        return {"large": got.take("large"), **dict(got)}


class Into:
    def __init__(self) -> None:
        self.target = {
            "large": torch.nn.Parameter(torch.zeros(900, 700).to(DEVICE)),
            "small": torch.zeros(3, 40, dtype=torch.int32).to(DEVICE).t(),
            "bool": torch.zeros(70, 20, dtype=torch.bool),
        }

    def __call__(self, path: Path) -> Tensors:
        weightload.load_into(self.target, path, strict=False)
        return self.target


class IntoModel:
    def __init__(self) -> None:
        self.model = torch.nn.Module()
        self.model.large = torch.nn.Parameter(torch.zeros(900, 700).to(DEVICE))

    def __call__(self, path: Path) -> Tensors:
        weightload.load_model(self.model, path, strict=False)
        return dict(self.model.named_parameters())


CALLS: dict[str, Callable[[], Callable[[Path], Tensors]]] = {
    "iterator": lambda: iterated,
    "load_file": lambda: lambda path: weightload.load_file(path, DEVICE),
    "load": lambda: lambda path: weightload.load(path.read_bytes(), DEVICE),
    "load, number of a device": lambda: lambda path: weightload.load(path.read_bytes(), 0),
    "get_tensor": lambda: each_tensor,
    "slices": lambda: slices,
    "prefetch": lambda: prefetched,
    "load_into": Into,
    "load_model": IntoModel,
}


def facts(tensors: Tensors) -> dict[str, Any]:
    return {name: described(tensor) for name, tensor in tensors.items()}


def in_mode(mode: str, make: Callable[[], Callable[[Path], Tensors]], path: Path) -> dict[str, Any]:
    call = make()
    return facts(MODES[mode](lambda: undisturbed(lambda: call(path))))


@pytest.mark.parametrize("mode", MODES)
def test_every_call_in_every_mode(simulated: Any, path: Path, mode: str) -> None:
    with settings.override(**SMALL):
        for name, make in CALLS.items():
            assert in_mode(mode, make, path) == facts(make()(path)), name
            gc.collect()
