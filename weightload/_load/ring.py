"""The ring of page-locked memory by which a load to an accelerator goes: how many slots, of how many bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weightload import _C, settings
from weightload._base.addresses import is_address
from weightload._base.handlers import forgiven
from weightload._base.paths import Path
from weightload._base.plain_torch import empty, plainly

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_SLOT = 256 << 10  # bytes; below, a read costs more in calls than in copying


@plainly
def make_target(device: torch.device, most_bytes: int, pieces: int, rings: int = 1) -> _C.DeviceTarget:
    """Prepare an accelerator for one load of at most this many bytes: page-locking of its ring begins now.

    The ring is one for files in the page cache. Once they are open, the load finds whether they are, else it takes
    other slots. ``pieces``: how many contiguous ranges of files they are, as far as is known; each may end in a slot of
    its own. ``rings``: that share the memory which the settings allow.
    """
    now = settings.current()
    pinned, cached = max(now.pinned_bytes // rings, 1), max(now.cached_pinned_bytes // rings, 1)
    # Also does what torch does lazily on the first use of a device.
    empty([0], torch.uint8, device)
    slots, slot_bytes, enough = _slots(now.slot_bytes, pinned, pinned, most_bytes, pieces)
    if cached >= pinned:
        return _C.DeviceTarget(str(device), slots, slot_bytes, enough, None)
    cold = (slots, slot_bytes)
    part = cached // max(settings.SLOTS_OF_CACHED, 2 * now.thread_count())
    smaller = min(now.slot_bytes, max(LEAST_SLOT, 1 << max(0, part.bit_length() - 1)))
    slots, slot_bytes, enough = _slots(smaller, cached, pinned, most_bytes, pieces)
    return _C.DeviceTarget(str(device), slots, slot_bytes, enough, None if slot_bytes == cold[1] else cold)


def _slots(slot_bytes: int, enough_bytes: int, pinned_bytes: int, most_bytes: int, pieces: int) -> tuple[int, int, int]:
    """How many slots a load may have at most, their bytes, and how many are enough."""
    now = settings.current()
    # A small load is cut as finely as keeps all threads busy.
    while slot_bytes > LEAST_SLOT and slot_bytes % 8192 == 0 and most_bytes < 2 * now.thread_count() * slot_bytes:
        slot_bytes //= 2
    # torch's host allocator takes powers of two.
    locked = 1 << (slot_bytes - 1).bit_length()
    if locked > pinned_bytes:
        slot_bytes = locked = 1 << (pinned_bytes.bit_length() - 1)
    needed = most_bytes // slot_bytes + pieces
    enough = max(1, min(enough_bytes // locked, needed))
    # Bytes that a slot has no room for begin the next: any two in a row are more than one full slot.
    return max(1, min(pinned_bytes // locked, 2 * needed)), slot_bytes, enough


def own_share(total_bytes: int, files: int, group: ProcessGroup | None, strategy: str) -> tuple[int, int]:
    """Bytes of a load that this rank of the group reads, and how many contiguous ranges of files they are at most."""
    if group is None:
        return total_bytes, files
    own = total_bytes // group.size() if strategy == "striped" else total_bytes if group.rank() == 0 else 0
    # Shares of blocks, which are cut where blocks and files are.
    return own, files + 2 * (1 + own * group.size() // settings.current().device_block_bytes)


def bytes_of_files(paths: Sequence[Path]) -> int:
    """Bytes of files before they are opened; 0 for what cannot be asked, which opening it will say better.

    For a server's object more than any ring holds: asking for its size would cost as much as opening it.
    """
    total = 0
    for path in paths:
        if is_address(path):
            return settings.LARGEST >> 1
        with forgiven(OSError, ValueError, TypeError):
            total += os.stat(path).st_size
    return total
