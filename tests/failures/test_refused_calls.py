"""Calls that only give advice may be refused by a kernel, a sandbox or a file system. That costs speed, and no load."""

from __future__ import annotations

import errno
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import evict, write_tensors
from refusals import CALLS, ERRNOS, PATHS, Server
from support.ways import CPU_WAYS, content

from weightload import _C, errors, settings
from weightload._load import fetch

filtered = pytest.mark.skipif(platform.machine() != "x86_64", reason="the filters know the numbers of x86-64")

# Those that are asked where files are not in the page cache.
OF_COLD_FILES = [
    "MADV_POPULATE_READ",
    "madvise",
    "cachestat, mincore, preadv2",
    "getrusage",
    "statfs",
    "O_DIRECT",
    "mmap of files",
    "/proc",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("refused"))
    yield started
    started.close()


@filtered
@pytest.mark.parametrize("error", ERRNOS)
@pytest.mark.parametrize("call", [*CALLS, *PATHS])
def test_warm_loads_of_every_kind(server: Server, call: str, error: str) -> None:
    assert server.faults(call, error, "warm") == []


@filtered
@pytest.mark.parametrize("error", ERRNOS)
@pytest.mark.parametrize("call", OF_COLD_FILES)
def test_cold_loads_of_every_kind(server: Server, call: str, error: str) -> None:
    assert server.faults(call, error, "cold") == []


@filtered
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize("call", ["everything", "mmap of files", "/proc"])
def test_ranks_that_share_a_load(server: Server, call: str, error: str) -> None:
    assert server.faults(call, error, "ranks") == []


@pytest.mark.parametrize("error", ERRNOS)
@pytest.mark.parametrize("way", ["iterator-pread", "load_file-pread", "load_into", "prefetch-pread"])
def test_direct_reads(tmp_path: Path, arm: Callable[..., None], way: str, error: str) -> None:
    """The descriptor could be had, and its first reads fail."""
    path = write_tensors(tmp_path / "x.safetensors", [(str(i), "U8", [3 << 20]) for i in range(3)])
    wanted = content(path)
    evict([path])
    with settings.override(read="direct", task_bytes=4 << 20, threads=1):
        arm("error", first=1, count=1, error_number=getattr(errno, error))
        assert CPU_WAYS[way]([path]) == wanted
    assert _C.reads_since_armed() > 2


def test_a_bad_sector_is_an_error_where_the_machines_memory_is_not_known(
    tmp_path: Path, arm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tensors(tmp_path / "x.safetensors", [("a", "U8", [16 << 20])])
    evict([path])
    monkeypatch.setattr(fetch, "meminfo", dict)
    arm("error", first=1, count=10**6, error_number=errno.EIO)
    with pytest.raises(errors.ReadError):
        CPU_WAYS["load_file-mmap"]([path])


@filtered
@pytest.mark.parametrize("error", ERRNOS)
def test_a_bad_sector_is_an_error_where_populating_is_refused(server: Server, error: str) -> None:
    assert server.faults("MADV_POPULATE_READ", error, "bad") == []
