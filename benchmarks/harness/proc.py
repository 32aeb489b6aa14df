"""Reads the kernel's figures of processes and file systems. Imports nothing: processes of every loader use it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Memory that a process holds beyond the page cache: anonymous memory, and shared memory.
MEMORY_FIELDS = ("RssAnon", "RssShmem")


def memory_fields(files: Sequence[str]) -> Sequence[str]:
    """Those for a process that loads these files: pages of mapped tmpfs files count as shared memory."""
    return MEMORY_FIELDS if file_system(files[0]) != "tmpfs" else MEMORY_FIELDS[:1]


def process_memory(process: int, fields: Sequence[str]) -> int:
    """Bytes of these kinds of memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.partition(":")[0] in fields)


def available_memory() -> int:
    """Bytes that programs can still take without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def file_system(path: str) -> str | None:
    """The kind of file system that a path is on, such as ext4 or tmpfs."""
    longest, found = -1, None
    real = os.path.realpath(path)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        where = where.encode().decode("unicode_escape")
        if os.path.commonpath([where, real]) == where and len(where) >= longest:
            longest, found = len(where), kind
    return found
