"""Shared by the tests on a simulated accelerator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weightload
from weightload._base.load_stats import LoadStats
from weightload._load.start import DeviceWeightIterator

# Which stand-in: the backend of our own, CUDA's torch on the simulated CUDA ("cuda"), or none: a GPU ("gpu").
CHOSEN = os.environ.get("WEIGHTLOAD_TEST_ACCELERATOR", "simulated")
KIND = "cuda" if CHOSEN == "gpu" else CHOSEN
DEVICE, OTHER = f"{KIND}:0", f"{KIND}:1"
two_devices = pytest.mark.skipif(CHOSEN == "gpu" and torch.cuda.device_count() < 2, reason="one GPU")
stand_ins_only = pytest.mark.skipif(CHOSEN == "gpu", reason="about a stand-in's memory")
own_backend_only = pytest.mark.skipif(KIND != "simulated", reason="about the backend of our own")
# Small enough that slots and blocks are reused many times by a checkpoint of a few megabytes.
SMALL: dict[str, Any] = {
    "slot_bytes": 64 << 10,
    "pinned_bytes": 256 << 10,
    "device_block_bytes": 256 << 10,
    "threads": 4,
}
TUNED: dict[str, Any] = {**SMALL, "threads": 3}  # of loads that ranks share


def native() -> Any:
    """The knobs of the stand-in, which is there for torch afterwards."""
    if CHOSEN == "gpu":
        from support import real_cuda as stand_in
    elif KIND == "cuda":
        import simulated_cuda.native as stand_in  # type: ignore[no-redef]
    else:
        import simulated_accelerator as stand_in  # type: ignore[no-redef]
    made = stand_in.load()
    made.set_available(True)
    return made


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, on the CPU."""
    return tensor.cpu().reshape(-1).view(torch.uint8)


def reference_of(*paths: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in paths for name, tensor in safetensors.torch.load_file(path).items()}


def assert_same(ours: dict[str, torch.Tensor], *paths: Path, device: str = DEVICE) -> None:
    reference = reference_of(*paths)
    assert set(ours) == set(reference)
    for name, tensor in ours.items():
        other = reference[name]
        assert (tensor.dtype, tensor.shape, str(tensor.device)) == (other.dtype, other.shape, device), name
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 256 == 0
        assert torch.equal(raw(tensor), raw(other)), name


def load(*paths: Path, **options: Any) -> DeviceWeightIterator:
    weights = weightload.safetensors_weights_iterator(list(paths), device=options.pop("device", DEVICE), **options)
    assert isinstance(weights, DeviceWeightIterator)
    return weights


def load_stats_of(path: Path) -> LoadStats:
    weights = load(path)
    dict(weights)
    return weights.stats()


@contextmanager
def current_stream(stream: torch.Stream) -> Iterator[None]:
    """Make the stream the current one of its device."""
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def take_freed_memory() -> list[torch.Tensor]:
    """Tensors that get device memory which was given back just now, of every size that blocks had; all fives.

    Does not wait for streams that a test has stopped: on CUDA a copy of pageable memory would.
    """
    sizes = (256 << 10, 256 << 10, 64 << 10, 1 << 20)
    if KIND == "cuda":
        return [torch.full((size,), 5, dtype=torch.uint8, device=DEVICE) for size in sizes]
    return [torch.full((size,), 5, dtype=torch.uint8).to(DEVICE) for size in sizes]


def assert_untouched(taken: list[torch.Tensor]) -> None:
    """Nobody who had the memory before has written to it since."""
    for tensor in taken:
        assert bool((tensor.cpu() == 5).all())


def filled(value: int, count: int = 1000) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.uint8).to(DEVICE)
