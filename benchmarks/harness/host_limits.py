"""The limits of this machine for the bytes of a checkpoint, measured beside the loaders and in the same rounds.

Each is a function of the files that returns seconds. All use the threads that weightload would, but for reads past the
page cache: what a disk gives depends on how much it is asked at once, so those have several settings, each a limit of
its own, of which the fastest counts.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from gpu.limits import Copy, direct_read
from loaders.peers import DEVICE, MAPPED, PRIVATE

from harness.machine import PIECE, raw_parallel_read
from weightload.settings import current

Limit = Callable[[Sequence[str]], float]
READ = "parallel read into buffers used again"
DIRECT = "direct read"
DIRECT_READS = ((2, 8), (8, 1), (8, 8), (16, 1), (16, 8))  # threads, and MiB of each read
MAP = "parallel mapping of the page cache"
NEW = "parallel read into new memory"
TOUCHED = "parallel read into memory used before"
COPY = "copy from pinned memory"

MADV_POPULATE_READ = 22  # Linux 5.14
MOST_COPIED = 8_000_000_000
_libc = ctypes.CDLL(None, use_errno=True)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _pieces(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """File, offset in it, and offset in all files, of every piece."""
    found, before = [], 0
    for number, size in enumerate(sizes):
        found += [(number, at, before + at) for at in range(0, size, PIECE)]
        before += size
    return found


def _read_into(files: Sequence[str], memory: mmap.mmap) -> None:
    """Read all files, one after the other, into this memory."""
    sizes = [os.path.getsize(file) for file in files]
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    whole = memoryview(memory)

    def read(piece: tuple[int, int, int]) -> None:
        number, at, to = piece
        end = min(sizes[number], at + PIECE)
        while at < end:
            got = os.preadv(descriptors[number], [whole[to : to + end - at]], at)  # releases the GIL
            if got == 0:
                raise OSError(f"{files[number]} ends at {at}")
            at, to = at + got, to + got

    try:
        with ThreadPoolExecutor(current().thread_count()) as pool:
            list(pool.map(read, _pieces(sizes)))
    finally:
        whole.release()
        for descriptor in descriptors:
            os.close(descriptor)


def _new_memory(files: Sequence[str]) -> mmap.mmap:
    memory = mmap.mmap(-1, sum(map(os.path.getsize, files)), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # fewer faults, by 512, where the kernel has huge pages
    return memory


def read_into_new_memory(files: Sequence[str]) -> float:
    """With the faults that bring in memory: what private tensors cost, less making them."""
    begin = time.perf_counter()
    with _new_memory(files) as memory:
        _read_into(files, memory)
        return time.perf_counter() - begin


def read_into_touched_memory(files: Sequence[str]) -> float:
    with _new_memory(files) as memory:
        np.frombuffer(memory, dtype=np.uint8).fill(1)
        return _timed(lambda: _read_into(files, memory))


def map_in_parallel(files: Sequence[str]) -> float:
    """All pages of the page cache put into page tables.

    Raises:
        OSError: the kernel is too old.
    """
    begin = time.perf_counter()
    sizes = [os.path.getsize(file) for file in files]
    mapped, addresses = [], []
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        mapped.append(mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
        os.close(descriptor)
        addresses.append(np.frombuffer(mapped[-1], dtype=np.uint8).ctypes.data)

    def populate(piece: tuple[int, int, int]) -> None:
        number, at, _ = piece
        address, size = ctypes.c_void_p(addresses[number] + at), ctypes.c_size_t(min(PIECE, sizes[number] - at))
        if _libc.madvise(address, size, MADV_POPULATE_READ):  # ctypes releases the GIL
            raise OSError(ctypes.get_errno(), "the kernel does not fill page tables on request")

    with ThreadPoolExecutor(current().thread_count()) as pool:
        list(pool.map(populate, _pieces(sizes)))
    return time.perf_counter() - begin


def setting_of(name: str) -> str:
    """The limit that this is one, or the only, setting of."""
    return name.partition(",")[0]


def limits_for(kind: str, cache: str, device: torch.device) -> tuple[dict[str, Limit], tuple[str, ...]]:
    """The limits that a scenario shows, and which (``setting_of``) the fastest that loads are held against is of."""

    def read(files: Sequence[str]) -> float:
        return _timed(lambda: raw_parallel_read(files, current().thread_count()))

    def direct(files: Sequence[str], threads: int, piece: int) -> float:
        return _timed(lambda: direct_read(files, threads, piece))

    if cache == "cold":  # the disk, past the page cache or through it
        past = {
            f"{DIRECT}, {threads} threads of {mib} MiB": partial(direct, threads=threads, piece=mib << 20)
            for threads, mib in DIRECT_READS
        }
        return {READ: read, **past}, (READ, DIRECT)
    if kind == DEVICE:
        copy = Copy(device)

        def copied(files: Sequence[str]) -> float:
            total = sum(map(os.path.getsize, files))
            moved = min(total, MOST_COPIED)
            return copy.seconds(8 << 20, moved) * total / moved

        return {COPY: copied}, (COPY,)
    if kind == MAPPED:
        return {MAP: map_in_parallel, READ: read}, (MAP,)
    private: dict[str, Limit] = {NEW: read_into_new_memory, TOUCHED: read_into_touched_memory, READ: read}
    return private, ((NEW,) if kind == PRIVATE else (TOUCHED,))
