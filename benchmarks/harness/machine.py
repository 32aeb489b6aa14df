"""Describes the machine of a result, and makes the state that a run starts from: cold or warm, and verified."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.proc import process_memory
from weightload import _C
from weightload._base.cpus import usable_cpus

# A cold run may start with this share of the files still in the page cache: pages that another process holds.
COLD_SHARE = 0.01
PIECE = 8 << 20


class NotEvictedError(RuntimeError):
    """The files could not be put out of the page cache, so a cold run would measure nothing."""


def describe(files: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit and storage, for the JSON and the table's head."""
    return {
        "machine": _cpu_model(),
        "cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "safetensors", "weightload", "numpy")},
        "commit": commit_of(Path(__file__).parent),
        "read_ahead_kb": _read_ahead_kb(files[0]) if files else None,
        **pages(),
    }


def pages() -> dict[str, Any]:
    """Settings that decide the price of fresh memory: huge pages, and whether a host takes back free memory."""
    huge = Path("/sys/kernel/mm/transparent_hugepage")
    chosen = {}
    for setting in ("enabled", "defrag", "shmem_enabled"):
        with contextlib.suppress(OSError):
            found = re.search(r"\[(\w+)\]", (huge / setting).read_text())
            chosen[setting] = found[1] if found else None
    return {"huge_pages": chosen, "page_reporting": Path("/sys/module/page_reporting").exists()}


def _cpu_model() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit_of(tree: Path) -> str | None:
    """The commit of a source tree, marked when the tree differs from it."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None


def _read_ahead_kb(path: str) -> int | None:
    """Readahead of the block device below a file (Linux's default is 128); decides what page faults can do."""
    device = os.stat(path).st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (folder / "queue", folder.resolve().parent / "queue"):
        with contextlib.suppress(OSError):
            return int((queue / "read_ahead_kb").read_text())
    return None


def resident_share(files: Sequence[str]) -> float:
    """Share of the files' bytes in the page cache (cachestat, else mincore)."""
    resident = 0
    for file in files:
        answer = _C.resident_bytes(os.fsencode(file))
        if answer is None:
            raise NotEvictedError("the kernel does not tell which pages are cached (own the files, or be root)")
        resident += answer
    return resident / max(1, sum(os.path.getsize(file) for file in files))


def evict(files: Sequence[str]) -> None:
    """Put the files out of the page cache, and verify it.

    Raises:
        NotEvictedError: more than 1 % of them is still there, for instance because something maps them.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    share = resident_share(files)
    if share > COLD_SHARE:
        raise NotEvictedError(f"{share:.0%} of the files is still in the page cache")


def fill_cache(files: Sequence[str]) -> None:
    """Read every file from one end to the other, as `cat` would; several files at a time."""

    def read(file: str) -> None:
        buffer = bytearray(PIECE)
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass

    with ThreadPoolExecutor(max(1, min(len(files), usable_cpus()))) as pool:
        list(pool.map(read, files))


def fill_cache_with_small_pages(files: Sequence[str]) -> None:
    """Bring evicted files into the page cache as single 4 KiB pages, the dearest to map.

    Plain reading leaves larger ones where readahead is generous; what a cache holds after weeks is somewhere between.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        for at in range(0, os.path.getsize(file), 2 << 20):
            os.posix_fadvise(descriptor, at, 2 << 20, os.POSIX_FADV_WILLNEED)
        os.close(descriptor)
    fill_cache(files)


def back_memory(size: int) -> None:
    """Touch and free this many bytes of memory, or what is free less a margin.

    Virtual machines give memory that was freed back to their host, and the next to touch it waits for a page fault
    there: several times slower than the disk. Touching it before a run takes that out of what the run measures.
    """
    free = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemFree" in line
    )
    size = min(size, free - (1 << 30))
    if size <= 0:
        return
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        half = size // 2
        with ThreadPoolExecutor(2) as pool:  # memset releases the GIL
            list(pool.map(lambda at: ctypes.memset(start + at, 1, half), (0, half)))


def back_memory_elsewhere(size: int) -> None:
    """Have another process back memory, so that none of it stays with this one."""
    script = f"from harness import machine; machine.back_memory({size})"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=True)


def raw_parallel_read(files: Sequence[str], threads: int) -> int:
    """Read all bytes with this many threads into buffers that are used again: what the storage can give.

    Each thread has descriptors of its own and one contiguous share of the bytes, so that the kernel sees as many
    sequential readers as there are threads.
    """
    sizes = [os.path.getsize(file) for file in files]
    share = -(-sum(sizes) // threads)

    def read(number: int) -> int:
        buffer = bytearray(PIECE)
        done = 0
        before = 0  # bytes of the files before this one
        for file, size in zip(files, sizes, strict=True):
            at, end = max(0, number * share - before), min(size, (number + 1) * share - before)
            if at < end:
                descriptor = os.open(file, os.O_RDONLY)
                while at < end:
                    got = os.preadv(descriptor, [memoryview(buffer)[: min(PIECE, end - at)]], at)
                    at, done = at + got, done + got
                os.close(descriptor)
            before += size
        return done

    with ThreadPoolExecutor(threads) as pool:  # preadv releases the GIL
        return sum(pool.map(read, range(threads)))


def private_bytes() -> int:
    """Anonymous memory of this process: what it holds beyond the page cache."""
    return _status("RssAnon")


def _status(field: str) -> int:
    return process_memory(os.getpid(), [field])


class PeakMemory:
    """The highest resident set since the start, over what it was at the start; mapped page cache counts."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._before = _status("VmRSS")

    def bytes(self) -> int:
        return max(0, _status("VmHWM") - self._before)
