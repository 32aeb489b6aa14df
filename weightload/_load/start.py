"""Starts a load: to the CPU or to an accelerator, alone or with other ranks; or fails, on all of these."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from weightload import _C, settings
from weightload._base.addresses import is_address
from weightload._base.handlers import pass_on
from weightload._base.load_stats import LoadStats
from weightload._checkpoint.selection import Names, Opening, Path, parts_in_order, select_all
from weightload._group.agreement import Check, Chosen, Sharing
from weightload._group.apart import SharedAndOwn, split
from weightload._group.ranks import STRATEGIES, has_cpu_backend, load_name, readers_of, resolve_group
from weightload._load import devices
from weightload._load.counting import Counting
from weightload._load.ring import bytes_of_files, make_target, own_share
from weightload._parts.chosen_parts import Shard, choose_parts
from weightload._parts.shards import NO_PARTS, Parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_BLOCK = 4096  # bytes: a tensor that is larger shares its memory with no other

_Self = TypeVar("_Self", bound="_Weights")


class _Weights:
    """The methods that Python adds to the core's loaders."""

    _counting: Counting

    if TYPE_CHECKING:

        def close(self) -> None: ...

        def counts(self) -> dict[str, Any]: ...

    @property
    def agreement_seconds(self) -> float:
        """Seconds that agreeing with other ranks took."""
        return self._counting.agreement_seconds

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stats(self) -> LoadStats:
        """Bytes, seconds and rates of the load so far; after its end, too."""
        return self._counting.stats(self.counts())


class WeightIterator(_Weights, _C.HostLoader):
    """Iterator of ``(name, tensor)`` over CPU memory; also a context manager. Tensors stay valid after it is closed.

    ``total_bytes`` is the size of the selected tensors, ``len()`` their number.
    """


class DeviceWeightIterator(_Weights, _C.DeviceLoader):
    """Iterator of ``(name, tensor)`` over an accelerator's memory, otherwise like ``WeightIterator``."""

    def stats(self) -> LoadStats:
        """Bytes, seconds and rates of the load so far, and of the ring; after its end, too."""
        return self._counting.stats(self.counts(), self.device_counts())


Started = WeightIterator | DeviceWeightIterator | SharedAndOwn


class Source(NamedTuple):
    """The files of a load."""

    paths: Sequence[Path]
    """Their names between ranks, and in errors before they are open."""
    open: Opening
    most_bytes: int | None = None
    """Bytes of their tensors; None: as many as the files at ``paths`` have."""

    @classmethod
    def of(
        cls, files: Sequence[_C.CheckpointFile], paths: Sequence[Path] | None = None, most_bytes: int | None = None
    ) -> Source:
        """Files that are open already."""
        most = sum(file.size for file in files) if most_bytes is None else most_bytes
        return cls([file.path for file in files] if paths is None else paths, functools.partial(list, files), most)


class Wanted(NamedTuple):
    """Which tensors of the files, and what of them; see ``safetensors_weights_iterator``."""

    names: Names | None = None
    parts: Parts = NO_PARTS
    """Unless ``shard`` is asked."""
    shard: Shard | None = None
    duplicates: str = "error"


class Sharers(NamedTuple):
    """The ranks that load together, and how; see ``resolve_group``."""

    group: ProcessGroup | None = None
    strategy: str = "independent"
    may_differ: bool = False
    """Whether what is wanted need not be the same on all of them."""
    check: Check | None = None
    """See ``Sharing``."""


class Reading(NamedTuple):
    """The memory of the tensors, and how it is filled."""

    backend: str = "mmap"
    """A ``Backend``, or ``"either"``: mapped where the files can be. For the CPU, as ``read_ahead``."""
    read_ahead: bool = True
    window_bytes: int | None = None
    """How far reading may run ahead, if not as the settings say."""
    own_blocks: bool = False
    """Whether on an accelerator each tensor has memory of its own, so that it may be dropped alone."""
    apart: bool = False
    """Whether no other rank of this node reads the same."""


ALL, ALONE, MAPPED = Wanted(), Sharers(), Reading()


def start(
    source: Source,
    device: torch.device,
    wanted: Wanted = ALL,
    sharers: Sharers = ALONE,
    reading: Reading = MAPPED,
    places: Sequence[torch.Tensor | None] = (),
) -> Started:
    """Open the files of a load, and start reading.

    Args:
        source: the files. Slots for an accelerator are page-locked while they are opened.
        device: the CPU, or an accelerator with its index.
        places: memory on the device for some of the tensors, in their order. The iterator gives ``(name, None)`` for
            them, and they are complete when it ends, for the stream that is current then. Where bytes travel between
            ranks there are none.
    """
    group, strategy = sharers.group, sharers.strategy
    counting = Counting()
    on_cpu = device.type == "cpu"

    def ring(most_bytes: int, rings: int = 1) -> _C.DeviceTarget | None:
        return None if on_cpu else make_target(device, most_bytes, pieces, rings)

    def choose() -> Chosen:
        files = counting.opened(source.open)
        try:
            selection = select_all(files, wanted.names, wanted.duplicates)
            if wanted.shard is None:
                return files, selection, wanted.parts
            return (files, *choose_parts(files, selection, wanted.shard))
        except BaseException:
            files.clear()  # an exception's traceback would keep them open
            raise

    def load(
        chosen: Chosen, target: _C.DeviceTarget | None, sharing: Sharing | None = None, counting: Counting = counting
    ) -> WeightIterator | DeviceWeightIterator:
        files, selection, parts = chosen
        core = sharing.core if sharing else None
        weights: WeightIterator | DeviceWeightIterator
        try:
            now = settings.current()
            counting.agreement_seconds = sharing.seconds if sharing else 0.0
            counting.loading(files)
            what = files, selection, [] if core else list(places), core, parts_in_order(files, selection, parts)
            read = getattr(_C.ReadMode, now.read_mode(readers_of(core is not None, reading.apart)))
            window = reading.window_bytes
            if target is None:
                _C.keep_memory(now.spare_bytes)
                weights = WeightIterator(
                    *what,
                    map=core is None and reading.backend != "pread",
                    must_map=core is None and reading.backend == "mmap",
                    read_ahead=reading.read_ahead,
                    threads=now.threads_of(files),
                    cold_threads=now.threads_of(files, cold=True),
                    threads_at_first=now.threads_at_first(files),
                    window_bytes=now.window_bytes if window is None else window,
                    task_bytes=now.task_bytes,
                    block_bytes=now.block_bytes,
                    read=read,
                )
            else:
                weights = DeviceWeightIterator(
                    target,
                    *what,
                    threads=now.threads_of(files),
                    threads_at_first=now.threads_at_first(files),
                    block_bytes=LEAST_BLOCK if reading.own_blocks else now.device_block_bytes,
                    window_bytes=now.device_block_bytes if window is None else window,
                    read=read,
                )
        except BaseException:
            _give_back(target)
            raise
        finally:
            # The core holds them now; an exception's traceback would keep them open through this frame.
            files.clear()
        weights._counting = counting
        return weights

    most_bytes = pieces = 0
    try:
        if not on_cpu:
            devices.require_no_capture(device)
            total = bytes_of_files(source.paths) if source.most_bytes is None else source.most_bytes
            most_bytes, pieces = own_share(total, len(source.paths), group, strategy)
        target = ring(most_bytes)
    except Exception as error:
        if group is not None:
            fail_together(error, group, strategy, source.paths, device)
        raise
    sharing: Sharing | None = None
    files: list[_C.CheckpointFile] = []
    try:
        if group is None:
            return load(choose(), target)
        sharing = Sharing(group, strategy, device, target, source.paths, sharers.check)
        chosen = files, selection, parts = sharing.agree(choose, sharers.may_differ)
        if sharing.differ:
            _give_back(target)
            target = ring(most_bytes, rings=2)  # they have one ring's memory between them
            common = sharing.find_common(chosen, target)
            if any(common):
                rest, is_common = split(selection, common)
                shared = load((list(files), common, NO_PARTS), target, sharing, Counting())
                try:
                    own = load((list(files), rest, parts), ring(_bytes_of(files, rest), rings=2))
                    return SharedAndOwn(shared, own, is_common)
                except BaseException:
                    shared.close()
                    raise
            _give_back(target)
            target = ring(_bytes_of(files, selection))
        return load(chosen, target, sharing)
    except BaseException:
        _give_back(target)  # an exception's traceback would keep it through this frame
        raise
    finally:
        files.clear()
        if sharing is not None:
            sharing.close()


def _give_back(target: _C.DeviceTarget | None) -> None:
    if target is not None:
        target.close()


def _bytes_of(files: Sequence[_C.CheckpointFile], selection: Sequence[Sequence[int]]) -> int:
    return sum(map(_C.CheckpointFile.bytes_of, files, selection))


def fail_together(
    error: BaseException,
    group: ProcessGroup,
    strategy: str,
    paths: Sequence[Path],
    device: torch.device | None = None,
) -> None:
    """Raise this rank's error on every rank of the group, in place of the agreement that the others expect.

    They are told between CPUs, or through ``device`` where the group has no backend for CPUs; without either, or where
    that device can do nothing now, they are not told.
    """

    def fail() -> Chosen:
        raise error

    if has_cpu_backend(group):
        Sharing(group, strategy, devices.CPU, None, paths).agree(fail)
    elif device is not None and device.type not in ("cpu", "meta"):
        try:
            here = devices.resolve(device)
            devices.require_no_capture(here)
            target = make_target(here, 0, 1)
        except Exception as failed:
            pass_on(failed)
            return
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
        kind = devices.kind_of(device)
        group, chosen = resolve_group(group, chosen, kind, load_name(paths), remote)
    except Exception as failed:
        pass_on(failed)
        return  # the arguments' error comes first
    if group is not None:
        fail_together(error, group, chosen, paths, torch.device(kind))
