"""Bytes wanted and bytes read: what parts of tensors, some of many tensors, and reads of whole disk blocks cost."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import evict, on_a_local_disk, write_tensors
from support.parts import rank_of, untouched_like
from support.ranks.groups import assert_done, run_ranks
from support.simulated import DEVICE
from torch.distributed.tensor import Shard, distribute_tensor

import weightload
from weightload import _C, settings
from weightload._base.load_stats import LoadStats
from weightload.cli import main as cli

BLOCK = 4096  # of O_DIRECT
KIB = 1 << 10

# Shape of int16, the part that is wanted, and the ratio of what is read to it: least and most.
ALL, HALF = slice(None), slice(0, 256)
PARTS: dict[str, tuple[list[int], Any, float, float]] = {
    "all": ([500, 512], None, 1, 1),
    "rows": ([500, 512], (slice(100, 300),), 1, 1),
    "rows in two runs": ([500, 512], ([(0, 10), (30, 40)],), 1, 1),
    "columns, 8 KiB apart": ([60, 8 * KIB], (ALL, slice(100, 4 * KIB + 100)), 1, 1),
    "columns, 24 KiB apart": ([60, 16 * KIB], (ALL, slice(4 * KIB, 8 * KIB)), 1, 1),
    # Where they are not copied out of the page cache, piece by piece:
    "halves of short rows": ([5000, 512], (ALL, HALF), 1, 2),
    "three quarters of short rows": ([5000, 512], (ALL, slice(0, 384)), 1, 4 / 3),
    "quarters of short rows": ([5000, 512], (ALL, slice(0, 128)), 1, 1),  # piece by piece
    "large pieces": ([4, 512 * KIB], (ALL, slice(0, 256 * KIB)), 1, 1),
    "none of it": ([4, 4], (slice(0, 0),), 0, 0),
}
TO: dict[str, dict[str, Any]] = {
    "mmap": {"to_cpu": True, "backend": "mmap"},
    "pread": {"to_cpu": True, "backend": "pread"},
    "accelerator": {"device": DEVICE, "strategy": "independent"},
}


@pytest.fixture(params=TO)
def to(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "accelerator":
        request.getfixturevalue("simulated")
    return TO[request.param]


def stats_of(paths: Any, **options: Any) -> tuple[LoadStats, int]:
    """Load, and return the load's statistics and the bytes that it yielded."""
    weights = weightload.safetensors_weights_iterator(paths, **options)
    got = sum(tensor.nbytes for _, tensor in weights)
    return weights.stats(), got


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_tensors(part: str, cold: bool, to: dict[str, Any], tmp_path: Path) -> None:
    shape, box, least, most = PARTS[part]
    path = write_tensors(tmp_path / "m.safetensors", [("x", "I16", shape)])
    if cold:
        evict([path])
    with settings.override(read="buffered"):
        stats, got = stats_of(path, shard=lambda *_: box, **to)
    assert stats.bytes == got
    if to.get("backend") == "mmap" and stats.read_bytes == 0:  # a view whose pages its consumer brings in
        assert (stats.wanted_bytes, stats.read_amplification) == (0, None)
        assert stats.threads == 0
        return
    assert stats.wanted_bytes == got
    assert least * got <= stats.read_bytes <= most * got
    assert stats.read_amplification == (stats.read_bytes / got if got else None)
    assert sum(file.rounded_bytes for file in stats.files) == 0


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_shards_that_are_read_in_place(part: str, swapped: bool, tmp_path: Path) -> None:
    """Halves of every dimension but the rows' run: the same ratios, or less."""
    shape = PARTS[part][0]
    path = write_tensors(tmp_path / "m.safetensors", [("x", "I16", shape)])
    with rank_of((2,), 1) as mesh:
        target = untouched_like(
            distribute_tensor(torch.zeros(shape, dtype=torch.int16), mesh, [Shard(int(swapped))], src_data_rank=None)
        )
        stats = weightload.load_into({"x": target}, path).stats["cpu"]
    assert stats.wanted_bytes == target.to_local().nbytes
    between = shape[1] // 2 * 2
    dense = swapped and between < 8 * KIB
    assert stats.read_amplification is not None
    assert (stats.read_amplification > 1) == dense
    assert stats.read_amplification <= 2


@pytest.mark.parametrize("read", ["buffered", "direct"])
def test_some_of_many_experts(read: Any, to: dict[str, Any], tmp_path: Path) -> None:
    """Those of one rank: nothing of the others is read but what shares a disk block with them."""
    names = [f"experts.{expert}.{name}" for expert in range(64) for name in ("up", "down")]
    path = write_tensors(tmp_path / "m.safetensors", [(name, "I16", [150, 257]) for name in names])
    mine = {name for name in names if int(name.split(".")[1]) % 8 == 3}
    evict([path])
    with settings.override(read=read):
        stats, got = stats_of(path, names=mine, **to)
    assert stats.bytes == got == len(mine) * 150 * 257 * 2
    if stats.read_bytes or to.get("backend") != "mmap":
        assert stats.wanted_bytes == got
        assert 1 <= (stats.read_amplification or 0) <= 1.1
        assert (stats.read_bytes > got) == (stats.direct_bytes > 0)


@pytest.mark.parametrize("begin", [0, 8, BLOCK - 8])  # of the tensor, in a block
@pytest.mark.parametrize("behind", [0, 8, 3 * BLOCK])  # bytes of others, to the end of the file
def test_blocks_that_are_read_whole(begin: int, behind: int, to: dict[str, Any], tmp_path: Path) -> None:
    size = (2 << 20) + 1000
    entries = [("before", "U8", [(begin - 8) % BLOCK]), ("x", "U8", [size]), ("behind", "U8", [behind])]
    path = write_tensors(tmp_path / "m.safetensors", entries, pad_to=BLOCK)
    if not on_a_local_disk(path):
        pytest.skip("not on a local disk")
    whole = path.stat().st_size
    first, last = whole - behind - size, whole - behind
    assert first % BLOCK == begin
    evict([path])
    with settings.override(read="direct"):
        stats, got = stats_of(path, names=["x"], **to)
    if stats.direct_bytes == 0:
        assert to.get("backend") == "mmap"
        return
    low, high = first // BLOCK * BLOCK, -(-last // BLOCK) * BLOCK
    # The file's last block is read through the page cache, and only what is wanted of it.
    in_blocks = min(high, whole // BLOCK * BLOCK)
    expected = in_blocks - low + max(0, last - in_blocks)
    assert (stats.direct_bytes, stats.wanted_bytes, stats.read_bytes) == (got, got, expected)


def test_what_was_not_read_directly_after_all_is_not_counted_twice(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("x", "U8", [3 << 20])])
    evict([path])
    try:
        with settings.override(read="direct", threads=1):
            _C.arm_fault("delay", first=1 << 60)
            before, got = stats_of(path, **TO["pread"])
            if before.direct_bytes == 0:
                pytest.skip("no direct reads here")
            assert before.read_bytes > got
            block = _C.reads_since_armed() - 2  # that which the tensor's first bytes share with the header
            for refused, ways in ((1, (got, 0)), (block, (0, got))):
                evict([path])
                _C.arm_fault("error", first=refused, count=1, error_number=errno.EINVAL)
                stats, _ = stats_of(path, **TO["pread"])
                assert (stats.buffered_bytes, stats.direct_bytes) == ways
                assert (stats.wanted_bytes, stats.read_bytes) == (got, got)
    finally:
        _C.disarm_fault()


def test_what_a_rank_reads_of_a_shared_load_is_what_it_wants(tmp_path: Path) -> None:
    """One that is alone wants all."""
    path = write_tensors(tmp_path / "m.safetensors", [(f"x{n}", "F32", [1000]) for n in range(9)])
    with rank_of((2,), 0), settings.override(read="buffered"):
        stats, got = stats_of(path, **TO["pread"], broadcast=False)
    assert stats.wanted_bytes == stats.read_bytes == got


STRIPED = """
path = sys.argv[4]
with weightload.settings.override(read="buffered"):
    weights = weightload.safetensors_weights_iterator(path, device="cpu", strategy="striped", group=dist.group.WORLD)
    got = sum(tensor.nbytes for _, tensor in weights)
stats = weights.stats()
assert stats.bytes == got
assert 0 < stats.wanted_bytes == stats.read_bytes < got, stats
total = torch.tensor([stats.wanted_bytes])
dist.all_reduce(total)
assert total.item() == got, (total, got)
dist.destroy_process_group()
print("done")
"""


def test_ranks_that_share_want_their_stripes(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [(f"x{n}", "F32", [100_000]) for n in range(9)])
    assert_done(run_ranks(STRIPED, 2, tmp_path, path))


def test_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("x", "I16", [5000, 512])])
    weightload.release_memory()  # what nobody has touched is filled by read calls
    with settings.override(read="buffered"):
        stats, _ = stats_of(path, shard=lambda *_: (ALL, HALF), **TO["pread"])
    assert "over-read   1.99 times: 0.005 GB of the files for 0.003 GB of tensors" in str(stats)
    values = json.loads(json.dumps(stats.as_dict()))
    assert (values["wanted_bytes"], values["read_bytes"]) == (stats.wanted_bytes, stats.read_bytes)
    assert values["read_amplification"] == stats.read_amplification
    assert values["files"][0]["wanted_bytes"] == stats.wanted_bytes
    assert values["files"][0]["read_bytes"] == stats.read_bytes
    assert cli.main(["load", str(path), "--backend", "pread", "--stats"]) == 0
    assert "over-read   1.00 times" in capsys.readouterr().out
    assert cli.main(["load", str(path), "--backend", "pread", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["read_amplification"] == pytest.approx(1, abs=0.01)
