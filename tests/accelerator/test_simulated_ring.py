"""The pinned ring across loads and before the headers are known, the simulation's poison, and more parity."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import evict, on_a_local_disk, write_tensors
from support.simulated import DEVICE, SMALL, assert_same, load, stand_ins_only

from weightload import _C, settings
from weightload._checkpoint.selection import open_files
from weightload._load.start import Source, start

pytestmark = pytest.mark.simulated


def test_page_locking_begins_before_the_headers_are_open(simulated: Any, shards: list[Path]) -> None:
    def open_when_locked() -> Any:
        deadline = time.monotonic() + 60
        while simulated.pinned_bytes() == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert simulated.pinned_bytes() > 0
        return open_files(shards)

    with settings.override(**SMALL):
        weights = start(Source([""] * 3, open_when_locked, 30 << 20), torch.device(DEVICE))
        assert_same(dict(weights), *shards)


def test_cached_files_take_smaller_slots_than_cold_ones(simulated: Any, tmp_path: Path) -> None:
    """Unless the settings make no difference between them; bytes in memory are as good as cached."""
    if not on_a_local_disk(tmp_path):
        pytest.skip("needs files that can be put out of the page cache")
    path = write_tensors(tmp_path / "t.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(16)])

    def slots_filled(cold: bool = False, in_memory: bool = False) -> int:
        if cold:
            evict([path])
        else:
            path.read_bytes()
        if in_memory:
            file = _C.from_bytes(path.read_bytes())
            weights = start(Source.of([file], most_bytes=16 << 20), torch.device(DEVICE))
        else:
            weights = load(path)
        assert_same(dict(weights), path)
        device = weights.stats().device
        assert device is not None
        return device.slots_filled

    with settings.override(threads=2, cached_pinned_bytes=16 << 20, pinned_bytes=64 << 20):
        assert slots_filled() >= 16 << 20 >> 19  # a 32nd of the ring each
        assert slots_filled(in_memory=True) >= 16 << 20 >> 19
        assert slots_filled(cold=True) <= 16 << 20 >> 21
    with settings.override(threads=2, cached_pinned_bytes=16 << 20, pinned_bytes=64 << 20, read="direct"):
        assert slots_filled() <= 16 << 20 >> 21
    with settings.override(threads=2, cached_pinned_bytes=64 << 20, pinned_bytes=64 << 20):
        assert slots_filled() <= 16 << 20 >> 21


def test_the_next_load_takes_the_slots_of_the_last(simulated: Any, mixed: list[Path]) -> None:
    """Memory comes from torch's caching host allocator, which poisons (here) what it hands out again."""
    made = simulated.pinned_made()
    with settings.override(**SMALL):
        for _ in range(20):
            assert_same(dict(load(mixed[0])), mixed[0])
            simulated.synchronize(0)
    assert simulated.pinned_made() - made <= SMALL["pinned_bytes"] // SMALL["slot_bytes"]


@stand_ins_only
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
