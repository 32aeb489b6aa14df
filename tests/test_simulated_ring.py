"""The pinned ring across loads and before the headers are known, the simulation's poison, and more parity."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tensors
from simulated_support import DEVICE, SMALL, assert_same, load

from weightload import settings
from weightload.device_iterator import load_to_device
from weightload.selection import open_files

pytestmark = pytest.mark.simulated


def test_page_locking_begins_before_the_headers_are_open(simulated: Any, shards: list[Path]) -> None:
    def open_when_locked() -> Any:
        deadline = time.monotonic() + 60
        while simulated.pinned_bytes() == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert simulated.pinned_bytes() > 0
        return open_files(shards)

    with settings.override(**SMALL):
        weights = load_to_device(torch.device(DEVICE), 30 << 20, [""] * 3, open_when_locked, None)
        assert_same(dict(weights), *shards)


def test_the_next_load_takes_the_slots_of_the_last(simulated: Any, mixed: list[Path]) -> None:
    """Memory comes from torch's caching host allocator, which poisons (here) what it hands out again."""
    made = simulated.pinned_made()
    with settings.override(**SMALL):
        for _ in range(20):
            assert_same(dict(load(mixed[0])), mixed[0])
            simulated.synchronize(0)
    assert simulated.pinned_made() - made <= SMALL["pinned_bytes"] // SMALL["slot_bytes"]


def test_fresh_and_reused_memory_is_poisoned(simulated: Any) -> None:
    def everywhere(tensor: torch.Tensor, value: int) -> bool:
        return bool((tensor.cpu().view(torch.uint8) == value).all())

    assert everywhere(torch.empty(1000, dtype=torch.uint8, device=DEVICE), 0xCD)
    for _ in range(2):
        pinned = torch.empty(12_345, dtype=torch.uint8, pin_memory=True)
        assert everywhere(pinned, 0xEE)
        pinned.fill_(1)
        del pinned


@pytest.mark.parametrize("shift", range(8))
def test_odd_headers(simulated: Any, tmp_path: Path, shift: int) -> None:
    """The checkpoints of test_parity whose tensors lie where no dtype would like them."""
    path = tmp_path / "odd.safetensors"
    tensors = [("x" * (shift + 1), "U8", [shift + 1]), ("a", "F32", [5]), ("b", "BOOL", [3]), ("c", "F64", [7, 1])]
    write_tensors(path, [*tensors, ("d", "BF16", [1]), ("e", "C64", [2]), ("f", "I16", [9])], pad_to=1)
    assert_same(dict(load(path)), path)


def test_a_large_tensor_among_small_ones(simulated: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    small = [(f"small.{i}", "BF16", [17]) for i in range(100)]
    write_tensors(path, [*small, ("large", "F32", [18_000_001]), ("last", "U8", [1])])
    assert_same(dict(load(path)), path)
