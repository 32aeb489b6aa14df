"""The iterator over an accelerator's memory, behind safetensors_weights_iterator, load_file, load and load_into."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from weightload import _C, settings
from weightload._base.addresses import is_address
from weightload._base.handlers import forgiven, pass_on
from weightload._base.load_stats import LoadStats
from weightload._base.plain_torch import empty, plainly
from weightload._checkpoint.selection import Names, Path, open_and_choose, open_files, parts_in_order
from weightload._group.agreement import Check, Chosen, Sharing
from weightload._group.apart import SharedAndOwn, start_both
from weightload._group.ranks import STRATEGIES, has_cpu_backend, load_name, readers_of, resolve_group
from weightload._load import devices
from weightload._load.counting import Counting
from weightload._parts.chosen_parts import Shard
from weightload._parts.shards import NO_PARTS, Parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_BLOCK = 4096  # bytes: a tensor that is larger shares its memory with no other
LEAST_SLOT = 256 << 10  # bytes; below, a read costs more in calls than in copying


class DeviceWeightIterator(_C.DeviceLoader):
    """Iterator of ``(name, tensor)``; also a context manager. Tensors stay valid after it is closed.

    ``total_bytes`` is the size of the selected tensors, ``len()`` their number, ``agreement_seconds`` what agreeing
    with other ranks took. ``places`` has memory on the device for some of the tensors, in their order; the iterator
    then gives ``(name, None)`` for them, and they are complete, for the stream that is current then, when it ends.
    ``window_bytes``: how far reading may run ahead, in place of a block. ``counting``: made when the load began.
    """

    def __init__(
        self,
        target: _C.DeviceTarget,
        files: list[_C.CheckpointFile],
        selection: list[list[int]],
        places: Sequence[torch.Tensor | None] = (),
        parts: Parts = NO_PARTS,
        sharing: Sharing | None = None,
        window_bytes: int | None = None,
        counting: Counting | None = None,
        apart: bool = False,
    ) -> None:
        now = settings.current()
        self.agreement_seconds = sharing.seconds if sharing else 0.0
        self._counting = counting or Counting()
        self._counting.agreement_seconds = self.agreement_seconds
        self._counting.loading(files)
        try:
            super().__init__(
                target,
                files,
                selection,
                list(places),
                sharing.core if sharing else None,
                parts_in_order(files, selection, parts),
                threads=now.threads_of(files),
                block_bytes=now.device_block_bytes,
                window_bytes=now.device_block_bytes if window_bytes is None else window_bytes,
                read=getattr(_C.ReadMode, now.read_mode(readers_of(sharing is not None, apart))),
            )
        finally:
            # The core holds them now; an exception's traceback would keep them open through this frame.
            files.clear()

    def __enter__(self) -> DeviceWeightIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stats(self) -> LoadStats:
        """What the load has done so far, and how long it took; after its end, too."""
        return self._counting.stats(self.counts(), self.device_counts())


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
    # What a slot has no room for begins the next: any two in a row are more than one full slot.
    return max(1, min(pinned_bytes // locked, 2 * needed)), slot_bytes, enough


def load_apart(filename: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Every tensor of a file on an accelerator, in memory of its own, so that each may be dropped alone.

    Raises:
        FileNotFoundError, HeaderError, ReadError, TensorError, OutOfMemoryError: as ``safetensors_weights_iterator``.
    """
    window = settings.current().device_block_bytes
    with settings.override(device_block_bytes=LEAST_BLOCK):
        most = bytes_of_files([filename])
        open_it = functools.partial(open_files, [filename])
        return dict(load_to_device(device, most, [filename], open_it, None, window_bytes=window))


def load_to_device(
    device: torch.device,
    most_bytes: int,
    paths: Sequence[Path],
    open_them: Callable[[], list[_C.CheckpointFile]],
    names: Names | None,
    group: ProcessGroup | None = None,
    strategy: str = "independent",
    places: Sequence[torch.Tensor | None] = (),
    parts: Parts = NO_PARTS,
    shard: Shard | None = None,
    window_bytes: int | None = None,
    duplicates: str = "error",
    may_differ: bool = False,
    apart: bool = False,
    check: Check | None = None,
) -> DeviceWeightIterator | SharedAndOwn:
    """Start a load of at most so many bytes: slots are page-locked while ``open_them`` opens the headers.

    It is shared with the ranks of ``group`` unless that is None: there are no places then, and names and parts are the
    same on all, unless they ``may_differ``. ``shard`` takes the place of ``parts``. ``apart``: no other rank of this
    node reads the same. ``check``: see ``Sharing``.
    """
    counting = Counting()
    open_them = counting.opening(open_them)
    own_bytes, pieces = most_bytes, len(paths)
    if group is not None:
        own_bytes = own_share(most_bytes, group, strategy)
        # Shares of blocks, which are cut where blocks and files are.
        pieces += 2 * (1 + own_bytes * group.size() // settings.current().device_block_bytes)
    try:
        devices.require_no_capture(device)
        target = make_target(device, own_bytes, pieces)
    except Exception as error:
        if group is not None:
            fail_together(error, group, strategy, paths)
        raise
    sharing: Sharing | None = None

    def choose() -> Chosen:
        files, selection, chosen = open_and_choose(open_them, names, duplicates, shard)
        return files, selection, chosen or parts

    try:
        if group is None:
            files, selection, wanted = choose()
            return DeviceWeightIterator(
                target, files, selection, places, wanted, window_bytes=window_bytes, counting=counting, apart=apart
            )
        sharing = Sharing(group, strategy, device, target, paths, check)
        shared = sharing.agree(choose, may_differ)
        if not sharing.differ:
            files, selection, wanted = shared
            return DeviceWeightIterator(target, files, selection, parts=wanted, sharing=sharing, counting=counting)
        # With one ring's memory between the two loads.
        target.close()
        target = make_target(device, own_bytes, pieces, rings=2)
        common = sharing.find_common(shared, target)
        files, selection, wanted = shared

        def start_shared(numbers: list[list[int]]) -> DeviceWeightIterator:
            return DeviceWeightIterator(target, list(files), numbers, sharing=sharing)

        def start_own(numbers: list[list[int]], rings: int = 2) -> DeviceWeightIterator:
            own = make_target(device, sum(map(_C.CheckpointFile.bytes_of, files, numbers)), pieces, rings)
            try:
                return DeviceWeightIterator(own, list(files), numbers, parts=wanted, counting=counting)
            except BaseException:
                own.close()
                raise

        try:
            if any(common):
                return start_both(selection, common, start_shared, start_own)
            target.close()
            return start_own(selection, rings=1)
        finally:
            files.clear()
    except BaseException:
        # An exception's traceback would keep its ring through this frame.
        target.close()
        raise
    finally:
        if sharing is not None:
            sharing.close()


def fail_together(
    error: BaseException,
    group: ProcessGroup,
    strategy: str,
    paths: Sequence[Path],
    device: torch.device | None = None,
) -> None:
    """Raise this rank's error on every rank of the group, in place of the agreement that the others expect.

    They are told between CPUs, or through ``device`` where the group has no backend for CPUs; without either they are
    not told.
    """

    def fail() -> Chosen:
        raise error

    if has_cpu_backend(group):
        Sharing(group, strategy, devices.CPU, None, paths).agree(fail)
    elif device is not None and device.type not in ("cpu", "meta"):
        here = devices.resolve(device)
        target = make_target(here, 0, 1)
        try:
            Sharing(group, strategy, here, target, paths).agree(fail)
        finally:
            target.close()


def fail_arguments_together(
    error: Exception,
    group: ProcessGroup | None,
    strategy: str,
    device: devices.Device | None,
    paths: Sequence[Path],
) -> None:
    """``fail_together`` for an error of this rank's arguments, where the call would communicate were they right."""
    try:
        chosen = strategy if strategy in STRATEGIES else "auto"
        remote = any(map(is_address, paths))
        group, chosen = resolve_group(group, chosen, devices.kind_of(device), load_name(paths), remote)
    except Exception as failed:
        pass_on(failed)
        return  # the arguments' error comes first
    if group is not None:
        fail_together(error, group, chosen, paths)


def own_share(total_bytes: int, group: ProcessGroup, strategy: str) -> int:
    """Bytes of a load that this rank of the group reads."""
    if strategy == "striped":
        return total_bytes // group.size()
    return total_bytes if group.rank() == 0 else 0


def bytes_of_files(paths: Sequence[Path]) -> int:
    """Bytes of files before they are opened; 0 for what cannot be asked, which opening it will say better.

    Of what a server has as much as a ring may be of use for: asking would cost as much as opening it.
    """
    total = 0
    for path in paths:
        if is_address(path):
            return settings.LARGEST >> 1
        with forgiven(OSError, ValueError, TypeError):
            total += os.stat(path).st_size
    return total
