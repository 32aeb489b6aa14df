"""A CRC is made of what the load's own threads read of a local file: each byte once, the one that the tensor has."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import simulated_accelerator
import torch
from safetensors.torch import load_file, save_file

import weightload
from weightload import settings
from weightload._verify import checker
from weightload._verify.crc_tap import FileTap
from weightload.errors import ChecksumError, ReadError, WeightLoadError

checksums = pytest.importorskip("awscrt.checksums")

Range = tuple[int, int]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two of 10 MB, with tensors of all sizes that begin where no disk block does."""
    for number in range(2):
        tensors = {f"{number}.{i}": torch.randint(0, 256, (1 + i**9 % 4_000_001,), dtype=torch.uint8) for i in range(9)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


@pytest.fixture
def verify(files: list[Path]) -> dict[str, str]:
    return {path.name: f"crc32c:{checksums.crc32c(path.read_bytes()):08x}" for path in files}


class Seen:
    """Records what taps were told, and what the threads that hash have read themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[Range] = []
        self.read: list[Range] = []
        take, hash_ = FileTap.take, checker.Parts._hash

        def taking(tap: FileTap, begin: int, data: memoryview) -> None:
            self.taken.append((begin, begin + len(data)))
            take(tap, begin, data)

        def hashing(parts: checker.Parts, begin: int, end: int) -> None:
            self.read.append((begin, end))
            hash_(parts, begin, end)

        monkeypatch.setattr(FileTap, "take", taking)
        monkeypatch.setattr(checker.Parts, "_hash", hashing)

    def bytes(self) -> tuple[int, int]:
        return sum(end - begin for begin, end in self.taken), sum(end - begin for begin, end in self.read)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def headers(files: list[Path]) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)


def private(files: list[Path], verify: dict[str, str]) -> dict[str, torch.Tensor]:
    return dict(weightload.safetensors_weights_iterator(files, to_cpu=True, backend="pread", verify=verify))


def into(files: list[Path], verify: dict[str, str]) -> dict[str, torch.Tensor]:
    target = {name: torch.zeros_like(tensor) for path in files for name, tensor in load_file(path).items()}
    weightload.load_into(target, files, verify=verify)
    return target


@pytest.mark.parametrize("load", [private, into])
@pytest.mark.parametrize("read", ["auto", "buffered", "direct"])
@pytest.mark.parametrize("window", [256 << 20, 1 << 20])
def test_each_byte_is_hashed_once(
    files: list[Path],
    verify: dict[str, str],
    seen: Seen,
    load: Callable[[list[Path], dict[str, str]], dict[str, torch.Tensor]],
    read: str,
    window: int,
) -> None:
    with settings.override(read=read, window_bytes=window, task_bytes=window):
        got = load(files, verify)
    for path in files:
        for name, tensor in load_file(path).items():
            assert torch.equal(got[name], tensor)
    taken, other = seen.bytes()
    size = sum(path.stat().st_size for path in files)
    assert taken + other == size
    assert other <= headers(files) + (4096 if load is into else 0)  # and tensors too small to be read by threads


@pytest.mark.parametrize("load", [private, into])
@pytest.mark.parametrize("at", [3, 5_000_000, -1])
@pytest.mark.parametrize("read", ["buffered", "direct"])
def test_a_bit_is_noticed(
    files: list[Path],
    verify: dict[str, str],
    load: Callable[[list[Path], dict[str, str]], dict[str, torch.Tensor]],
    at: int,
    read: str,
) -> None:
    data = bytearray(files[1].read_bytes())
    if at == 3:
        at = data.index(b'"1.')  # in the header: a space more would do, too
        data[at + 2 : at + 3] = b"_"
    else:
        data[at] ^= 4
    files[1].write_bytes(data)
    with settings.override(read=read), pytest.raises(ChecksumError) as raised:
        load(files, verify)
    assert raised.value.filename == str(files[1])


def test_reading_past_the_page_cache_stays_so(files: list[Path], verify: dict[str, str]) -> None:
    """Nobody reads the file a second time, which would want it in the page cache."""
    with settings.override(read="direct"):
        weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend="pread", verify=verify)
        dict(weights)
    stats = weights.stats()
    if not stats.direct_bytes:
        pytest.skip("this file system cannot")
    assert stats.direct_bytes > 0.9 * stats.wanted_bytes
    sha = {name: checksum for name, checksum in verify.items() if name != files[0].name}
    sha[files[0].name] = hashlib.sha256(files[0].read_bytes()).hexdigest()
    with settings.override(read="direct"):
        weights = weightload.safetensors_weights_iterator(files[:1], to_cpu=True, backend="pread", verify=sha)
        dict(weights)
    assert not weights.stats().direct_bytes  # of what another thread reads, too


def test_what_is_mapped_is_read_at_once(files: list[Path], verify: dict[str, str], seen: Seen) -> None:
    """It need not wait for the consumer."""
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend="mmap", verify=verify)
    assert weights._checker._running or seen.read  # type: ignore[union-attr]
    assert len(dict(weights)) == 18
    assert not seen.taken
    assert seen.bytes()[1] == sum(path.stat().st_size for path in files)


def test_parts_of_tensors(tmp_path: Path, seen: Seen) -> None:
    """Rows that are apart in the file are not worth putting together: all of it is read."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(512, 512), "b": torch.randn(512, 512)}, path)
    verify = {path.name: f"crc32c:{checksums.crc32c(path.read_bytes()):08x}"}
    halves = {"a": (slice(None), slice(0, 256)), "b": (slice(None), slice(256, 512))}
    got = dict(
        weightload.safetensors_weights_iterator([path], to_cpu=True, shard=lambda name, *_: halves[name], verify=verify)
    )
    right = load_file(path)
    assert all(torch.equal(got[name], right[name][halves[name]]) for name in halves)
    assert not seen.taken
    assert seen.bytes()[1] == path.stat().st_size


def test_some_of_the_tensors(files: list[Path], verify: dict[str, str], seen: Seen) -> None:
    """The others are read at the end."""
    names = ["0.7", "1.2", "1.8"]
    got = dict(weightload.safetensors_weights_iterator(files, to_cpu=True, backend="pread", names=names, verify=verify))
    assert sorted(got) == names
    assert sum(seen.bytes()) == sum(path.stat().st_size for path in files)
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    with pytest.raises(ChecksumError):
        dict(weightload.safetensors_weights_iterator(files, to_cpu=True, backend="pread", names=names, verify=verify))


def test_the_same_file_twice(files: list[Path], verify: dict[str, str]) -> None:
    weights = weightload.safetensors_weights_iterator(
        [files[0], files[0]], to_cpu=True, backend="pread", duplicates="last", verify=verify
    )
    assert len(dict(weights)) == 9


def test_ranges_that_overlap_and_differ() -> None:
    """Each is held against the digest."""
    tap = FileTap("crc32c", lambda: None)
    for begin, data in ((10, b"abcdef"), (10, b"abcdef"), (12, b"cdef"), (10, b"abcdeX"), (0, b"0123456789")):
        tap.take(begin, memoryview(data))
    readings = [[(begin, end) for begin, end, crc in reading.in_order(16) if crc] for reading in tap.readings]
    assert readings == [[(0, 10), (10, 16)], [(10, 16)], [(12, 16)]]


def test_wrong_bytes_in_one_reading_are_noticed(
    files: list[Path], verify: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load raises if storage gives it other bytes than the reader that reads again."""
    take = FileTap.take

    def other(tap: FileTap, begin: int, data: memoryview) -> None:
        take(tap, begin, memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1])) if begin < 5_000_000 else data)

    monkeypatch.setattr(FileTap, "take", other)
    with pytest.raises(ChecksumError):
        private(files, verify)


def test_a_tap_that_fails(files: list[Path], verify: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(tap: FileTap, begin: int, data: memoryview) -> None:
        raise MemoryError("no memory for it")

    monkeypatch.setattr(FileTap, "take", failing)
    with pytest.raises(ReadError, match="no memory for it") as raised:
        private(files, verify)
    assert raised.value.filename == str(files[0])


def test_the_signal_of_a_leave_that_fails(
    files: list[Path], verify: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt while a tap is left, such as a signal's handler raises, comes out where the load is made."""

    def failing(tap: FileTap) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileTap, "leave", failing)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        weightload.safetensors_weights_iterator(files, to_cpu=True, backend="mmap", verify=verify)
    assert not [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_leaving_early_lets_go(files: list[Path], verify: dict[str, str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend="pread", verify=verify)
    next(weights)
    weights.close()
    with pytest.raises(WeightLoadError):
        weights._checker.finish()  # type: ignore[union-attr]
    del weights
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.simulated
def test_to_an_accelerator(files: list[Path], verify: dict[str, str], seen: Seen) -> None:
    native = simulated_accelerator.load()
    native.set_available(True)
    try:
        got = dict(weightload.safetensors_weights_iterator(files, to_cpu=False, device="simulated:0", verify=verify))
        for path in files:
            for name, tensor in load_file(path).items():
                assert torch.equal(got[name].cpu(), tensor)
        taken, other = seen.bytes()
        assert taken + other == sum(path.stat().st_size for path in files)
        assert other <= headers(files)
        data = bytearray(files[0].read_bytes())
        data[-9] ^= 1
        files[0].write_bytes(data)
        with pytest.raises(ChecksumError):
            dict(weightload.safetensors_weights_iterator(files, to_cpu=False, device="simulated:0", verify=verify))
    finally:
        native.set_available(False)


AT_EXIT = """
    import sys, weightload
    weights = weightload.safetensors_weights_iterator(
        sys.argv[2:], to_cpu=True, backend="pread", verify=dict([arg.split("=") for arg in sys.argv[1].split()]))
    print(next(weights)[0])
"""


def test_the_interpreter_exits_meanwhile(files: list[Path], verify: dict[str, str]) -> None:
    """Threads that want the GIL to hash are gone before it is."""
    digests = " ".join(f"{name}={value}" for name, value in verify.items())
    for _ in range(3):
        command = [sys.executable, "-c", textwrap.dedent(AT_EXIT), digests, *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
