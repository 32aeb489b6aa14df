"""load_into: read a checkpoint straight into the memory of parameters that exist."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from weightload import _C, devices, progress
from weightload.device_iterator import (
    DeviceWeightIterator,
    fail_arguments_together,
    fail_together,
    load_to_device,
)
from weightload.distributed import load_name, require_strategy, resolve_group
from weightload.duplicates import Duplicates, one_of_each, require_duplicates
from weightload.iterator import WeightIterator, load_to_host
from weightload.load_report import LoadReport
from weightload.load_stats import LoadStats
from weightload.paths import Path, Paths, path_list
from weightload.plain_torch import plainly
from weightload.selection import open_files
from weightload.state_dict import Match, Target, match, tensors_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def load_into(
    target: Target,
    files: Paths,
    *,
    strict: bool = True,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    duplicates: Duplicates = "error",
    show_progress: bool | None = None,
) -> LoadReport:
    """Load a checkpoint into a module, or into a mapping of tensors, without a second copy of it.

    A tensor that is dense, contiguous and of the file's dtype is read into directly: on the CPU by the reading
    threads, on an accelerator by the copies out of the pinned ring. Others are loaded beside it, at most a block or
    two at a time, and copied and cast on their device. Tensors may be on several devices. Tied weights are read once;
    where the files have several of the tied names, the last in the target's order counts, as with
    ``Module.load_state_dict``.

    Names, shapes and dtypes are compared before the first byte is read: an error about them leaves the target as it
    was. An error on the way leaves it partly loaded. Autograd is told of the change (version counters).

    Args:
        target: a module (its parameters and persistent buffers) or a mapping of names to tensors.
        files: paths of the safetensors files, as for ``safetensors_weights_iterator``.
        strict: whether the names must be the same, as in ``Module.load_state_dict``.
        group, strategy: the ranks that share the reading, and how, as for ``safetensors_weights_iterator``; their
            targets must have the same names on the same kind of device. What travels between ranks is blocks of
            many tensors, so every tensor of a shared load is loaded beside its place and copied, on its device.
        duplicates: what to do where several files have a tensor of one name that the target has, as for
            ``safetensors_weights_iterator``.
        show_progress: as for ``safetensors_weights_iterator``.

    Returns:
        The names that were loaded, missing and unexpected, bytes, and seconds by stage.

    Raises:
        StateDictError: (a ``RuntimeError``) names or shapes differ, or a tensor of the target has no memory.
        FileNotFoundError, HeaderError, ReadError, TensorError, OutOfMemoryError, ValueError, TypeError, GroupError:
            as ``safetensors_weights_iterator``.
    """
    first = _first_device(target)
    paths: list[str] = []
    try:
        paths = path_list(files)
        require_strategy(strategy)
        require_duplicates(duplicates)
    except Exception as error:
        fail_arguments_together(error, group, strategy, first, paths)
        raise
    group, strategy = resolve_group(group, strategy, first.type, load_name(paths))
    begin = time.perf_counter()
    opened: list[_C.CheckpointFile] = []
    try:
        try:
            opened = open_files(paths)
            opened[:] = one_of_each(opened, duplicates, lambda: tensors_of(target))
            at_match = time.perf_counter()
            matched = match(target, opened, strict)
        except BaseException as error:
            if group is not None:  # the others are about to agree on the load
                fail_together(error, group, strategy, paths, first)
            raise
        if _shares(group, strategy):
            matched = dataclasses.replace(matched, direct=set())
        at_load = time.perf_counter()
        devices_here = devices_of(matched)
        if group is not None:
            devices_here.setdefault(first)  # a rank with nothing to load agrees on that, or says so
        sizes, stats = fill(matched, devices_here, opened, paths, group, strategy, show_progress)
    finally:
        # An exception's traceback would keep them open through this frame.
        opened.clear()
    end = time.perf_counter()
    return LoadReport(
        loaded=matched.loaded,
        missing=matched.missing,
        unexpected=matched.unexpected,
        bytes=sum(sizes[name] for name in matched.loaded),
        in_place=len(matched.direct),
        seconds={"open": at_match - begin, "match": at_load - at_match, "load": end - at_load, "total": end - begin},
        stats=stats,
    )


@plainly
def fill(
    matched: Match,
    to: Iterable[torch.device],
    files: list[_C.CheckpointFile],
    paths: Sequence[Path],
    group: ProcessGroup | None = None,
    strategy: str = "independent",
    show_progress: bool | None = False,
) -> tuple[dict[str, int], dict[str, LoadStats]]:
    """Load what was matched. Returns bytes of each tensor of the files, and stats of the load to each device."""
    sizes = {name: stop - start for file in files for name, _, _, start, stop in file.tensors()}
    stats: dict[str, LoadStats] = {}
    total = sum(sizes[name] for name in matched.places)
    try:
        with progress.bar(total, show_progress) as advance:
            for device in to:
                with _start(device, files, paths, matched, group, strategy) as weights:
                    _take(weights, matched, sizes, advance)
                stats[str(device)] = weights.stats()
    finally:
        # Bytes that changed behind autograd's back, perhaps not all of them.
        torch.autograd.graph.increment_version([matched.places[name] for name in matched.direct])
    return sizes, stats


@plainly
def devices_of(matched: Match) -> dict[torch.device, None]:
    """Where what was matched goes."""
    return dict.fromkeys(place.device for place in matched.places.values())


def _shares(group: ProcessGroup | None, strategy: str) -> bool:
    """Whether bytes travel between ranks, in blocks of the loader's."""
    return group is not None and strategy != "independent"


@plainly
def _first_device(target: Target) -> torch.device:
    tensors: Iterable[object] = ()
    if isinstance(target, torch.nn.Module):
        tensors = target.parameters()
    elif isinstance(target, Mapping):
        tensors = target.values()
    return next((tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)), devices.CPU)


def _start(
    device: torch.device,
    files: list[_C.CheckpointFile],
    paths: Sequence[Path],
    matched: Match,
    group: ProcessGroup | None,
    strategy: str,
) -> WeightIterator | DeviceWeightIterator:
    """The load of what goes to one device."""
    here = {name for name, place in matched.places.items() if place.device == device}
    in_order = [name for file in files for name in file.names() if name in here]
    places = [matched.places[name] if name in matched.direct else None for name in in_order]
    if _shares(group, strategy):
        places = []
    elif device.type != "cpu":
        group = None
    if device.type == "cpu":
        return load_to_host(group, strategy, paths, lambda: list(files), here, backend="either", places=places)
    most_bytes = sum(file.size for file in files)
    return load_to_device(
        devices.resolve(device), most_bytes, paths, lambda: list(files), here, group, strategy, places
    )


def _take(
    weights: WeightIterator | DeviceWeightIterator, matched: Match, sizes: dict[str, int], advance: progress.Advance
) -> None:
    """Let the load run, and put into place what could not be read there."""
    held: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, tensor in weights:
            if name in matched.overlapping:
                held[name] = tensor
            elif name not in matched.direct:
                _put(tensor, matched.places[name])
            advance(sizes[name])
        # One over the other, as load_state_dict would.
        for name in matched.overlapping:
            if name in held:
                _put(held[name], matched.places[name])


def _put(tensor: torch.Tensor, place: torch.Tensor) -> None:
    value = tensor.reshape(place.shape)
    if place.is_inference():  # the caller's inference mode is not on here, and torch insists on it
        with torch.inference_mode():
            place.copy_(value)
    else:
        place.copy_(value)
