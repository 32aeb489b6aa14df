"""The accelerator path on the simulated accelerator: right bytes, in the right place, whatever the order of things."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import SEED, TESTS, evict, on_a_local_disk, run_script, write_tensors
from support.simulated import (
    DEVICE,
    KIND,
    OTHER,
    SMALL,
    assert_same,
    load,
    load_stats_of,
    own_backend_only,
    raw,
    reference_of,
    two_devices,
)

import weightload
from weightload import _C, settings

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize("small", [False, True])
def test_every_dtype(simulated: Any, all_dtypes: Path, small: bool) -> None:
    with settings.override(**SMALL) if small else settings.override():
        assert_same(dict(load(all_dtypes)), all_dtypes)


def test_the_real_checkpoint(simulated: Any, real_checkpoint: Path) -> None:
    assert_same(dict(load(real_checkpoint)), real_checkpoint)
    assert_same(weightload.load_file(real_checkpoint, DEVICE), real_checkpoint)
    assert_same(weightload.load(real_checkpoint.read_bytes(), device=DEVICE), real_checkpoint)


@pytest.mark.parametrize("read", ["auto", "buffered", "direct"])
@pytest.mark.parametrize("cold", [True, False])
def test_every_way_of_reading(simulated: Any, mixed: list[Path], read: str, cold: bool) -> None:
    if cold:
        evict(mixed)
    else:
        for path in mixed:
            path.read_bytes()
    with settings.override(read=read, **SMALL):
        weights = load(*mixed)
        assert_same(dict(weights), *mixed)
    stats = weights.stats()
    assert stats.buffered_bytes + stats.direct_bytes == weights.total_bytes
    if read == "buffered" or (read == "auto" and not cold):
        assert stats.direct_bytes == 0
    if read == "direct" and on_a_local_disk(mixed[0]):
        assert stats.buffered_bytes == 0


@own_backend_only
@pytest.mark.parametrize("behind", [16, 512, 4080])
@pytest.mark.parametrize("slot_bytes", [8192, 20480, 65536])
def test_direct_reads_into_memory_that_is_not_page_aligned(
    simulated: Any, mixed: list[Path], behind: int, slot_bytes: int
) -> None:
    """torch locks malloc's memory with pinned_use_cuda_host_register. Direct reads work there, and lock no more."""
    simulated.shift_pinned(behind)
    with settings.override(**{**SMALL, "read": "direct", "slot_bytes": slot_bytes}):
        weights = load(*mixed)
        next(weights)
        assert simulated.pinned_bytes() <= SMALL["pinned_bytes"]
        weights.close()
        weights = load(*mixed)
        assert_same(dict(weights), *mixed)
    stats = weights.stats()
    if on_a_local_disk(mixed[0]):
        assert stats.direct_bytes == weights.total_bytes, stats


def test_direct_reads_leave_the_page_cache_alone(simulated: Any, tmp_path: Path) -> None:
    """Larger than any readahead that reading the header may start."""
    path = write_tensors(tmp_path / "cold.safetensors", [(f"{i}", "F32", [1_000_003]) for i in range(12)])
    if not on_a_local_disk(path):
        pytest.skip("not on a local disk")
    evict([path])
    with settings.override(slot_bytes=1 << 20, read="direct"):
        weights = load(path)
        got = dict(weights)
    assert weights.stats().direct_bytes == weights.total_bytes
    cached = _C.resident_bytes(os.fsencode(path))
    assert cached is not None
    assert cached < path.stat().st_size // 2
    assert_same(got, path)


def test_cold_ranges_are_tried_both_ways(simulated: Any, tmp_path: Path) -> None:
    """In a process of its own, since what was faster is remembered."""
    path = write_tensors(tmp_path / "cold.safetensors", [(f"{i}", "F32", [3_000_003]) for i in range(12)])
    if not on_a_local_disk(path):
        pytest.skip("not on a local disk")
    evict([path])
    script = f"""
    import sys
    sys.path.insert(0, {str(TESTS)!r})
    from pathlib import Path
    from support.simulated import assert_same, load, native
    native()
    from weightload import settings
    path = Path(sys.argv[1])
    with settings.override(slot_bytes=1 << 20):
        weights = load(path)
        got = dict(weights)
    stats = weights.stats()
    assert stats.direct_bytes >= 7 << 20, stats
    assert stats.buffered_bytes >= 7 << 20, stats
    assert_same(got, path)
    path.read_bytes()
    weights = load(path)
    dict(weights)
    assert weights.stats().direct_bytes == 0, "warm by now"
    """
    done = run_script(script, path)
    assert done.returncode == 0, done.stderr


def test_files_in_memory_are_not_read_directly(simulated: Any) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = write_tensors(Path(folder) / "tmpfs.safetensors", [("a", "F32", [300_000]), ("b", "U8", [7])])
        assert load_stats_of(path).direct_bytes == 0
        for read in ("auto", "direct"):  # whether tmpfs takes O_DIRECT depends on the kernel
            with settings.override(read=read):
                assert_same(dict(load(path)), path)


@pytest.mark.parametrize("slot_bytes", [4096, 8192, 16384, 1 << 20])
@pytest.mark.parametrize("block_bytes", [4096, 100_000, 1 << 30])
def test_any_cutting_gives_the_same_bytes(simulated: Any, mixed: list[Path], slot_bytes: int, block_bytes: int) -> None:
    sizes = {"slot_bytes": slot_bytes, "pinned_bytes": slot_bytes * 3, "device_block_bytes": block_bytes}
    with settings.override(threads=3, **sizes):
        assert_same(dict(load(*mixed)), *mixed)


def test_files_and_tensors_come_in_order(simulated: Any, mixed: list[Path]) -> None:
    with settings.override(**SMALL):
        names = [name for name, _ in load(*mixed)]
    files = [list(safetensors.safe_open(path, "pt").offset_keys()) for path in mixed]
    assert names == [name for file in files for name in file]


def test_selected_names_are_all_that_is_read(simulated: Any, mixed: list[Path]) -> None:
    wanted = {f"odd.{i}" for i in range(0, 90, 3)} | {"large"}
    with settings.override(**SMALL):
        weights = load(*mixed, names=wanted)
        got = dict(weights)
        reference = {name: tensor for name, tensor in reference_of(*mixed).items() if name in wanted}
        assert set(got) == wanted
        for name, tensor in got.items():
            assert torch.equal(raw(tensor), raw(reference[name])), name
    stats = weights.stats()
    assert stats.buffered_bytes + stats.direct_bytes == sum(tensor.nbytes for tensor in reference.values())


@two_devices
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (OTHER, OTHER),
        (KIND, DEVICE),
        (lambda: torch.device(KIND, 1), OTHER),
        (1, OTHER),
    ],
)
def test_devices_are_named_in_every_way(simulated: Any, all_dtypes: Path, device: Any, expected: str) -> None:
    device = device() if callable(device) else device
    assert_same(dict(load(all_dtypes, device=device)), all_dtypes, device=expected)
    assert_same(weightload.load_file(all_dtypes, device), all_dtypes, device=expected)


@two_devices
def test_the_default_device_is_that_of_the_local_rank(
    simulated: Any, all_dtypes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, expected in (("1", OTHER), ("0", DEVICE), ("7", DEVICE)):
        monkeypatch.setenv("LOCAL_RANK", number)
        assert_same(dict(load(all_dtypes, device=None)), all_dtypes, device=expected)
    monkeypatch.delenv("LOCAL_RANK")
    torch.accelerator.set_device_index(1)
    try:
        assert_same(dict(load(all_dtypes, device=None)), all_dtypes, device=OTHER)
    finally:
        torch.accelerator.set_device_index(0)


@own_backend_only
def test_devices_that_are_not_there_are_refused(simulated: Any, all_dtypes: Path) -> None:
    for device in ("simulated:2", "cuda:0", "meta", 5):
        with pytest.raises(ValueError, match=r"cannot load to|sees 2"):
            load(all_dtypes, device=device)
        with pytest.raises(ValueError, match=r"cannot load to|sees 2"):
            weightload.load_file(all_dtypes, device)
    simulated.set_available(False)
    for device in (DEVICE, 0):
        with pytest.raises(ValueError, match="no accelerator"):
            weightload.load_file(all_dtypes, device)


def test_to_cpu_wins_over_the_default_device(simulated: Any, all_dtypes: Path) -> None:
    assert next(weightload.safetensors_weights_iterator([all_dtypes], to_cpu=True))[1].device.type == "cpu"
    with pytest.raises(ValueError, match="contradicts"):
        weightload.safetensors_weights_iterator([all_dtypes], to_cpu=True, device=DEVICE)


def test_a_progress_bar_counts_every_byte(
    simulated: Any, mixed: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weightload.safetensors_weights_iterator(mixed, device=DEVICE, show_progress=True)
    assert_same(dict(weights), *mixed)
    assert "100%" in capsys.readouterr().err


def test_tensors_of_a_block_share_its_storage(simulated: Any, mixed: list[Path]) -> None:
    """The storage is the allocator's own: record_stream, which goes by storage, must know the memory."""
    got = dict(load(mixed[1]))
    filled = [tensor for tensor in got.values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in filled}) == 1
    stream = torch.Stream(device=DEVICE)
    filled[0].record_stream(stream)


def test_tensors_are_ordinary_leaves(simulated: Any, all_dtypes: Path) -> None:
    with torch.inference_mode():
        assert not any(tensor.is_inference() for tensor in dict(load(all_dtypes)).values())
    for _, tensor in load(all_dtypes):
        assert tensor.is_leaf
        assert not tensor.requires_grad
        assert not tensor.is_inference()
        assert tensor._version == 0


@pytest.mark.parametrize("offset", range(6))
def test_many_seeds(simulated: Any, mixed: list[Path], offset: int) -> None:
    """The whole of it under other delays each time; `make stress` runs thousands."""
    for seed in range(SEED + offset * 5, SEED + offset * 5 + 5):
        simulated.seed_delays(seed, longest_us=2000)
        with settings.override(**SMALL):
            assert_same(dict(load(*mixed)), *mixed)
