"""safetensors_weights_iterator: the drop-in for the iterators that engines load their weights with."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from weightload._base.addresses import is_address
from weightload._base.paths import Path, Paths, path_list
from weightload._base.plain_torch import plainly
from weightload._checkpoint.duplicates import Duplicates, require_duplicates
from weightload._checkpoint.selection import Names, Opening, open_files
from weightload._group.cached import CachedWeights, cache_of, require_cache
from weightload._group.ranks import load_name, require_strategy, resolve_group
from weightload._load import devices, progress
from weightload._load.fused_weights import FusedWeights, RenamedLoad
from weightload._load.options import Backend, require_backend
from weightload._load.renaming import Rename, require_rename
from weightload._load.start import Reading, Sharers, Source, Started, Wanted, fail_arguments_together, start
from weightload._parts.chosen_parts import Shard
from weightload._verify.checking import CheckedWeights, Checking, Ranks
from weightload._verify.digests import Verify, require_verify

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@plainly
def _target(to_cpu: bool, device: devices.Device | None) -> torch.device:
    if not to_cpu:
        return devices.resolve(device)
    if device is not None and (isinstance(device, int) or torch.device(device).type != "cpu"):
        raise ValueError(f"to_cpu=True contradicts device={device!r}")
    return devices.CPU


Weights = Started | FusedWeights | CheckedWeights | CachedWeights


def safetensors_weights_iterator(
    hf_weights_files: Paths,
    to_cpu: bool = False,
    broadcast: bool = True,
    async_broadcast: bool = False,
    *,
    device: devices.Device | None = None,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    names: Names | None = None,
    shard: Shard | None = None,
    rename: Rename | None = None,
    duplicates: Duplicates = "error",
    show_progress: bool | None = None,
    backend: Backend = "mmap",
    verify: Verify | None = None,
    cache: Path | None = None,
) -> Weights | progress.WeightsWithBar:
    """Iterate over the tensors of safetensors files: files in the given order, tensors by offset.

    Headers are opened and checked, and reading starts, before this returns. A yielded tensor may be used at once,
    and kept: its memory is its own or shared with neighbours that live as long as any of them. Leaving the loop
    early, or ``close()``, stops the reading.

    Args:
        hf_weights_files: paths of the files, each ``str``, ``bytes`` or ``os.PathLike`` (one path is taken as one
            file; a set, which has no order, by name; of no files nothing is yielded).
        to_cpu: yield CPU tensors and never communicate.
        broadcast: ``False``: with ``strategy="auto"``, every rank reads for itself.
        async_broadcast: accepted; a tensor is complete when it is yielded in any case.
        device: where to put the tensors: the CPU or an accelerator; default: the accelerator of this process
            (``LOCAL_RANK``), or the CPU where there is none. On an accelerator a tensor starts at a multiple of 256
            bytes and shares a block of memory with its neighbours; the stream that is current when it is yielded may
            use it at once.
        group: the ranks that share the reading; all of them must make this call, with equal files and arguments but for
            ``names`` and ``shard``. Where those differ, what all ranks want in full is shared, and the rest each reads
            for itself. (Where that is less than a tenth of what one of them wants, each reads all for itself. With
            ``rename``, all ranks must want and rename the same.)
            Default: the ranks of this node (``weightload.node_group()``). The group is used as it is, from the calling
            thread only: while the call runs, and while ``next()`` does, at points that are the same on all ranks. One
            load a group at a time.
        strategy: ``"independent"``: every rank reads everything, nobody communicates. ``"broadcast"``: the group's
            first rank reads, the others receive. ``"striped"``: each of N ranks reads an N-th of every block of
            memory, then an all-gather completes it. ``"auto"``: independent on the CPU within a node, where the ranks
            of a given ``group`` agree on the load all the same; else striped. CPU tensors of shared loads are in
            private memory.
        names: a collection of tensor names, or a predicate on names: only these are yielded and read. A filter: a
            name that no file has is no error.
        shard: ``(name, shape, dtype) -> None | False | tuple``, asked of each of these tensors before anything is read:
            what of it this process wants. None: all of it. False: none. A tuple: of each dimension, from the first, a
            slice of step 1, or a list of ``(begin, end)`` whose indices follow each other in what is yielded; of
            dimensions that it lacks, all. What is yielded is contiguous, and no more is read than that (of rows with
            less than 8 KiB between what is wanted of them up to twice as much). On the CPU a part that is contiguous in
            its file is a view, any other has memory of its own. Several ranges in one dimension cost a read for each
            piece of a row that they ask for.
        rename: what tensors are called: a function of the checkpoint's name, or a mapping (names that it lacks stay).
            ``None``: the tensor is skipped, and not read. A ``str``: its new name. A tuple ``(name, box)``: it fills a
            box of a tensor of this name, which is yielded once, in the place of the last of its pieces, and is as
            large as all of them together. The box is a tuple: of each dimension of that tensor, from the first, a
            slice of step 1, or an index, which is a dimension that the piece lacks; a slice without an end, and
            dimensions that the box lacks, are as long as the piece. The pieces of a tensor must tile it, and have one
            dtype. On the CPU they are read straight into it where their box is contiguous; else, and on accelerators,
            they are copied, a block or two at a time. ``names``, ``duplicates`` and ``shard`` speak of the
            checkpoint's names, errors of the new ones; ``shard`` and boxes exclude each other.
        duplicates: what to do where several files have a tensor of one name. An index file beside them that names
            them all decides which of them it is taken from. Where none does, ``"error"`` refuses the load, and
            ``"last"`` yields each name once, from the last file that has it, in that file's place: what a dict of
            the engines' iterators has in the end. Only the names that are yielded matter.
        show_progress: a tqdm bar in bytes, on rank 0, if stderr can be written. Default: where stderr is a terminal,
            on loads longer than a second.
        backend: ``"mmap"``: copy-on-write views of the mapped file, as in safetensors. ``"pread"``: private
            memory, which later changes of the file cannot reach; also for file systems that cannot map files. On an
            accelerator memory is always private.
        verify: check the SHA-256 of every file, all of it, while it is loaded; the verdict comes at the end of the
            iteration. ``"sha256"``: the digests are those of the hub's cache (the name of the blob), of an ``hf://``
            address, or of a file ``SHA256SUMS`` beside. A mapping: from file names to digests; a name may have folders,
            and is then that of the file whose path ends so. Files are read through the page cache. The ranks of a group
            must have the same digests. On one node they deal the files out, and what one of them finds is raised on
            all; each waits at its end for the others. Over several nodes each rank checks all local files. What a
            server has ``"auto"`` has one rank read, which checks it; ``"striped"`` costs each rank a reading of all.
        cache: a folder for copies of what servers have; it is made where it is missing. A file of which the folder has
            a copy is loaded from there, like any other local file, after one request that asks the server for size,
            tag and time; none for ``hf://`` addresses with a commit, which always mean the same. Any other is
            loaded from the server, and what is read is written on the way. A copy appears under its name when it is
            whole, at the latest when the iteration ends (with ``verify``, then, and if it was right). A load that is
            left early or fails leaves whole copies only. A load that picks tensors (``names``, ``shard``) uses copies
            and makes none. What else it leaves out, of ``duplicates`` and ``rename``, is asked for at the end if it is
            no more than an eighth of a file; else there is no copy of that file. Ranks that share a load write one
            copy together: their folder must be the same one, on one node. Nothing in the folder is ever removed but
            copies of earlier states of an object, and what processes that died have left.

    Returns:
        An iterator with ``close()`` (also a context manager), ``len()``, ``total_bytes`` and ``stats()``: at any time
        what the load has done, by stage, and what it waited for.

    Yields:
        ``(name, tensor)``. The tensor has the shape and dtype of the header (F4 as ``torch.float4_e2m1fn_x2``,
        whose last dimension counts pairs), is contiguous, and aligned to its dtype.

    Raises:
        FileNotFoundError: a file is missing (other errors of ``open()`` likewise).
        HeaderError: a file breaks a rule of the format; the subclass names the rule.
        ReadError: bytes could not be read; raised when the iteration reaches the first tensor they belong to.
        DuplicateTensor: (a HeaderError) a tensor's name is in several files, and nothing says which is meant; or
            ``rename`` gives one name to two tensors, not both of them with a box.
        TensorError: torch lacks a tensor's dtype; raised when the iteration reaches it.
        OutOfMemoryError: memory for a tensor could not be had; on an accelerator it is also a
            ``torch.OutOfMemoryError``. Everything the load had is free again, except for tensors that were yielded.
        ValueError: a device that torch cannot use here, a group that this process is not a member of, or boxes of
            ``rename`` that overlap, leave a gap, or are not as large as their tensor. On the ranks of a group it is a
            ``GroupValueError``.
        TypeError: something that is no path, or an answer of ``rename`` that is none.
        RankDisagreementError: the ranks of the group would load different files, tensors, ....
        GroupError: a rank of the group died, stopped, or never called, found out within the group's timeout.
        RankLeftError: a rank of the group left the load before its end.
        ChecksumError: ``verify``: a file has another digest; raised at the end of the iteration. CheckpointError: no
            digest of a file is known, or one name is two files'; raised by this call.
        CacheError: (an ``OSError``) ``cache``: the folder cannot be written or read, a full disk for example; with its
            ``errno``. The load does not go on without its copies. Of ranks that share it one that finds this out on
            the way raises a ``ReadError`` of the same words on all, at the end a ``CacheError`` on itself alone.

    An error of one rank is raised on every rank of the group, with its ``rank``, before any yields a tensor that
    depended on what failed.
    """
    paths: list[str] = []
    folder: str | None = None
    alone = to_cpu or (strategy == "auto" and not broadcast)
    chosen = "independent" if alone else strategy
    try:
        paths = path_list(hf_weights_files)
        require_strategy(strategy)
        require_backend(backend)
        require_duplicates(duplicates)
        require_rename(rename)
        require_verify(verify)
        if shard is not None and not callable(shard):
            raise TypeError(f"shard must be a function of (name, shape, dtype), not {type(shard).__name__}")
        folder = require_cache(cache)
        target = _target(to_cpu, device)
    except Exception as error:
        fail_arguments_together(error, group, chosen, device, paths)
        raise
    remote = any(map(is_address, paths))
    group, chosen = resolve_group(group, chosen, target.type, load_name(paths), remote, verify is not None)
    shared = group is not None and chosen != "independent"
    fill = names is None and shard is None
    copies = cache_of(folder, paths, fill=fill, at_end=verify is not None, group=group, shared=shared)
    open_them: Opening = functools.partial(open_files, paths, copies)
    checking: Checking | None = None
    if verify is not None:
        checking = Checking(paths, verify, Ranks.of(group, chosen) if group is not None else None)
        open_them = checking.opening(open_them)
    renamed: RenamedLoad | None = None
    if rename is not None:
        renamed = RenamedLoad(open_them, rename, names, duplicates, shard, target)
        open_them, names, duplicates, shard = renamed.open, None, "error", renamed.shard

    def begin() -> Started | FusedWeights:
        weights = start(
            Source(paths, open_them),
            target,
            Wanted(names, shard=shard, duplicates=duplicates),
            Sharers(group, chosen, may_differ=rename is None, check=checking),
            Reading(backend),
            renamed.places if renamed else (),
        )
        return weights if renamed is None else renamed.fuse(weights)

    weights: Weights
    try:
        weights = begin() if checking is None else checking.start(begin)
    except BaseException as error:
        if copies is not None:
            copies.stop(error)
        raise
    if copies is not None:
        weights = CachedWeights(weights, copies)
    if progress.wanted(show_progress):
        return progress.WeightsWithBar(weights, always=show_progress is True)
    return weights
