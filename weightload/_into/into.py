"""load_into: read a checkpoint straight into the memory of parameters that exist."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Mapping

import torch
from torch.distributed import ProcessGroup

from weightload import _C
from weightload._base.addresses import is_address
from weightload._base.paths import Path, Paths, path_list
from weightload._base.plain_torch import plainly
from weightload._checkpoint.duplicates import Duplicates, one_of_each, require_duplicates
from weightload._checkpoint.selection import Opening, open_files
from weightload._group.agreement import NOT_CHECKED, of_files
from weightload._group.cached import cache_of, require_cache, using
from weightload._group.ranks import load_name, require_group, require_strategy, resolve_group
from weightload._into.filling import Filling, shares
from weightload._into.load_report import LoadReport
from weightload._into.replicas import find_replicas
from weightload._into.state_dict import Target, differing_names, match, refusal, wanted_names, wanted_of
from weightload._into.together import of_dtensors, of_group, of_meshes
from weightload._load import devices
from weightload._load.renaming import Rename, Renamed, rename_opened, require_rename
from weightload._load.start import Source, fail_arguments_together, fail_together
from weightload._parts.shards import go_back_to_shards, is_dtensor
from weightload._verify.checking import Checking
from weightload._verify.digests import Verify, require_verify


def load_into(
    target: Target,
    files: Paths,
    *,
    strict: bool = True,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    rename: Rename | None = None,
    duplicates: Duplicates = "error",
    show_progress: bool | None = None,
    verify: Verify | None = None,
    cache: Path | None = None,
) -> LoadReport:
    """Load a checkpoint into a module, or into a mapping of tensors, without a second copy of it.

    A tensor that is dense, contiguous and of the file's dtype is read into directly: on the CPU by the reading
    threads, on an accelerator by the copies out of the pinned ring. Others are loaded beside it, at most a block or
    two at a time, and copied and cast on their device. Tensors may be on several devices. Tied weights are read once;
    where the files have several of the tied names, the last in the target's order counts, as with
    ``Module.load_state_dict``.

    A module is left as ``load_state_dict`` would leave it. Those of its modules that take part in their own loading
    (``_load_from_state_dict``, hooks, extra states in the file, a ``load_state_dict`` of the target's class) get their
    tensors, with those of all modules below them, as torch gives them: on the CPU, not in place.
    ``LoadReport.took_part`` names them. Hooks after loading are called. All that code of modules runs under the
    caller's torch modes, which change nothing otherwise.

    A DTensor gets its shard of the file's tensor, as ``distribute_tensor`` would deal it out, and no more is read than
    that (of rows with less than 8 KiB between what is wanted of them up to twice as much). Ranks that have the same
    shards (HSDP) share the reading by ``strategy``; all others each read theirs. Modules that FSDP has gathered for a
    forward go back to their shards first. **All ranks of the DTensors' meshes must make this call.** They compare
    headers, names, shapes, meshes, placements and what ``rename`` makes of them before the first byte is read, and wait
    for one another at the end. (DTensors of a mesh that has only some of the ranks, such as experts, are not compared.)

    What fails on one rank of those that load together (the ranks of ``group``, or of the meshes) is raised on all, with
    its ``rank``: at once where others wait, on those that still load within a second or a tensor.

    With ``rename``, several tensors of the checkpoint may fill boxes of one of the target's: q, k and v of a fused
    projection, experts of a stack. Each is read or copied into its box, of a DTensor into what the rank has of it.

    Names, shapes, dtypes and whether each tensor can be filled are looked at before the first byte is read: an error
    about them leaves the target as it was, and names all tensors that it concerns. What the code of a module complains
    of, and an error on the way, leave it partly loaded. Autograd is told of the change (version counters). Inference
    tensors are filled in and outside inference mode.

    Args:
        target: a module (its parameters and persistent buffers) or a mapping of names to tensors.
        files: paths of the safetensors files, as for ``safetensors_weights_iterator``.
        strict: whether the names must be the same, as in ``Module.load_state_dict``, which does not miss the
            ``num_batches_tracked`` of norms; nor are tied names missed if one of them is there.
        group, strategy: the ranks that share the reading, and how, as for ``safetensors_weights_iterator``; their
            targets must have the same names on the same kind of device. What travels between ranks is blocks of
            many tensors, so every tensor of a shared load is loaded beside its place and copied, on its device.
        rename: what the checkpoint's tensors are called in the target, and which box of its tensors they fill, as for
            ``safetensors_weights_iterator``; here a slice without an end, and dimensions that a box lacks, are those of
            the target. Boxes may have any dtype, and must not overlap. A tensor of which they fill a part only is
            missing: refused under ``strict``, else filled as far as they go and named in ``LoadReport.missing``.
            Modules that take part in their own loading get new names, but no boxes. The lists of the report have the
            target's names.
        duplicates: what to do where several files have a tensor of one name that the target has, as for
            ``safetensors_weights_iterator``.
        show_progress: as for ``safetensors_weights_iterator``.
        verify: check the SHA-256 of every file while it is loaded, as for ``safetensors_weights_iterator``. All is
            checked before this returns. But the bytes are in the target by then, and modules that take part in their
            own loading have seen them: after a ``ChecksumError`` the target must not be used.
        cache: a folder for copies of what servers have, as for ``safetensors_weights_iterator``. Loads into DTensors,
            which read parts of files, use copies and make none. Of a file of which the target lacks more than an
            eighth there is no copy either.

    Returns:
        The names that were loaded, missing and unexpected, bytes, and seconds by stage.

    Raises:
        StateDictError: (a ``RuntimeError``) names or shapes differ, boxes overlap or are not inside of their tensor, or
            a tensor of the target cannot be filled: it has no memory, or memory that is read-only, is of a class that
            takes no copy, or a DTensor that is no shard (of ``Partial`` placements, or in a module that takes part in
            its own loading).
        FileNotFoundError, HeaderError, ReadError, TensorError, OutOfMemoryError, ValueError, TypeError, GroupError,
        ChecksumError, CheckpointError, CacheError: as ``safetensors_weights_iterator``.
    """
    first = _first_device(target)
    paths: list[str] = []
    folder: str | None = None
    together = of_group(None, first.type)
    has_shards = False
    try:
        go_back_to_shards(target)
        has_shards = _has_shards(target)
        if has_shards:
            is_group = isinstance(group, ProcessGroup)  # if not, the others wait as if they were given none
            together = of_group(group, first.type) if is_group else of_meshes(_tensors(target))
            require_group(group)
        paths = path_list(files)
        together.load = load_name(paths)
        require_strategy(strategy)
        require_duplicates(duplicates)
        require_rename(rename)
        require_verify(verify)
        folder = require_cache(cache)
    except Exception as error:
        if has_shards:
            together.begin({}, error)
        else:
            fail_arguments_together(error, group, strategy, first, paths)
        raise
    if has_shards:
        group = None  # what is shared is between replicas
    else:
        remote = any(map(is_address, paths))
        group, strategy = resolve_group(group, strategy, first.type, load_name(paths), remote, verify is not None)
        together = of_group(group, first.type)
        together.load = load_name(paths)
    checking = Checking(paths, verify, together.checking(strategy)) if verify is not None else None
    fill, shared = not has_shards, shares(group, strategy)
    copies = cache_of(folder, paths, fill=fill, at_end=verify is not None, group=group, shared=shared)
    open_them: Opening = functools.partial(open_files, paths, copies)
    if checking is not None:
        open_them = checking.opening(open_them)
    if group is not None:  # the loads agree themselves
        together.waits = functools.partial(fail_together, group=group, strategy=strategy, paths=paths, device=first)
    elif not together.alone:
        together.waits = functools.partial(together.begin, {})

    def load() -> LoadReport:
        begin = time.perf_counter()
        opened = open_them()
        try:
            renamed: Renamed | None = None
            if rename is None:
                opened[:] = one_of_each(opened, duplicates, lambda: wanted_names(target, opened))
            else:
                renamed = rename_opened(opened, rename, duplicates, lambda names: wanted_of(target, names))
            at_match = time.perf_counter()
            matched = match(target, opened, strict, renamed)
            if copies is not None:
                copies.skip_others(opened, matched.places.keys() | matched.given())
            if group is None and not together.alone:
                checks = dict(NOT_CHECKED if checking is None else checking.same())
                made_of = renamed.by_target() if renamed else {}
                compared = of_dtensors(matched.dtensors, together.ranks, made_of, set(matched.absent))
                together.begin({"strategy": strategy} | of_files(opened, named=False) | compared | checks)
            replicas = find_replicas(matched.dtensors, strategy, together.load) if matched.dtensors else None
            if replicas is not None and group is None:
                together.waits = functools.partial(replicas.fail, paths=paths)
            source = Source.of(opened, paths)
            filling = Filling(matched, source, group, strategy, together, replicas, checking)
            at_load = time.perf_counter()
            filling.run(show_progress, first)
            loaded, missing, unexpected = _names(filling, target, opened, strict)
        finally:
            # An exception's traceback would keep them open through this frame.
            opened.clear()
        end = time.perf_counter()
        seconds = {"open": at_match - begin, "match": at_load - at_match, "load": end - at_load, "total": end - begin}
        return LoadReport(
            loaded=loaded,
            missing=missing,
            unexpected=unexpected,
            bytes=sum(matched.sizes[name] for name in loaded),
            in_place=len(filling.matched.direct),
            seconds=seconds,
            stats=filling.stats,
            took_part=[prefix[:-1] for prefix in matched.turns.walk.parts] if matched.turns else [],
        )

    with together, using(copies):
        return load() if checking is None else checking.run(load, together.look)


def _names(
    filling: Filling, target: Target, files: list[_C.CheckpointFile], strict: bool
) -> tuple[list[str], list[str], list[str]]:
    """Names that were loaded, are missing and were not expected.

    Raises:
        StateDictError: modules that had a say in it left names that ``strict`` minds.
    """
    matched = filling.matched
    if filling.names is None:
        return matched.loaded, matched.missing, matched.unexpected
    missing, unexpected = matched.without_tied(filling.names[0]), filling.names[1]
    surplus = set(unexpected)
    own_say = matched.turns is not None and matched.turns.has_own_say()
    if strict and not own_say and (words := differing_names(missing, unexpected)):
        raise refusal(target, files, [*words, "modules that take part in their loading said so: it is partly loaded"])
    return [name for name in matched.loaded if name not in surplus], missing, unexpected


def _tensors(target: Target) -> Iterable[torch.Tensor]:
    found: Iterable[object] = ()
    if isinstance(target, torch.nn.Module):
        found = itertools.chain(target.parameters(), target.buffers())
    elif isinstance(target, Mapping):
        found = target.values()
    return (tensor for tensor in found if isinstance(tensor, torch.Tensor))


@plainly
def _first_device(target: Target) -> torch.device:
    return next((tensor.device for tensor in _tensors(target)), devices.CPU)


@plainly
def _has_shards(target: Target) -> bool:
    return any(map(is_dtensor, {type(tensor): tensor for tensor in _tensors(target)}.values()))
