"""What lies below a checkpoint: its file system, and whether its files can be put out of the page cache."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from weightload import _C

# A cold load may start with this share of the files still in the page cache.
COLD_SHARE = 0.01
# Pages that were written lately are dropped once they are on the disk: asking to drop them makes that begin.
TRIES, PAUSE_S = 8, 0.25

# What a load takes them for (csrc/io/file_system.cpp, which goes by the numbers of statfs(2)), by their names in
# mountinfo.
MEMORY = ("tmpfs", "devtmpfs", "ramfs", "rootfs", "hugetlbfs")
SHARED = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "overlay", "fuse", "fuseblk", "virtiofs",
)  # fmt: skip


class NotColdError(RuntimeError):
    """Files that should be out of the page cache are not; in words, why."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where files lie."""

    file_system: str
    """As the kernel calls it, such as ``ext4``; ``unknown`` where it does not say."""
    source: str
    """What is mounted: a device, a server."""
    kind: str
    """``memory``; ``shared``: network, overlay (containers) or user space, where a load never reads past the page cache
    unless ``read`` is ``direct``; ``disk``: everything else."""

    def __str__(self) -> str:
        return f"{self.file_system} on {self.source} ({self.kind})"


def storage_of(path: str, mounts: Path = Path("/proc/self/mountinfo")) -> Storage:
    """The storage of a file, by the mount point that is nearest above it (proc(5), mountinfo)."""
    real = Path(os.path.realpath(path))
    best, found = -1, ("unknown", "unknown")
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(rest) < 2:
            continue
        point = Path(_unescaped(fields[4]))
        # The later of two at the same place lies above the other.
        if real.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), (rest[0], _unescaped(rest[1]))
    system, source = found
    # A file system in user space may add its own name: fuse.sshfs.
    kind = "memory" if system in MEMORY else "shared" if system.split(".")[0] in SHARED else "disk"
    return Storage(system, source, kind)


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def why_never_cold(files: Sequence[str]) -> str | None:
    """None where the files can be put out of the page cache and the kernel tells that they are, else why not."""
    if storage_of(files[0]).kind == "memory":
        return "the files lie in memory"
    return evict(files)


def evict(files: Sequence[str], sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Put files out of the page cache and verify it; None when they are out, else why not, in words.

    Drops clean pages of these files and nothing else: no byte of them changes, and other processes that use them only
    read them again. Pages that are dirty or mapped stay.
    """
    share = 0.0
    for number in range(TRIES):
        if number:
            sleep(PAUSE_S)
        for file in files:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                return f"the file system does not drop pages ({error.strerror})"
            finally:
                os.close(descriptor)
        resident = [_C.resident_bytes(os.fsencode(file)) for file in files]
        known = [count for count in resident if count is not None]
        if len(known) < len(resident):
            return "the kernel tells only the files' owner, or who may write them, what is in the page cache"
        share = sum(known) / max(1, sum(os.path.getsize(file) for file in files))
        if share <= COLD_SHARE:
            return None
    return f"{share:.0%} of the files stays in the page cache, written lately or mapped by another process"
