"""The parts of tensors that a caller's ``shard=`` asks for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from weightload import _C
from weightload._base.dtypes import TORCH_DTYPES, torch_shape
from weightload._base.printable import printable
from weightload._parts.shards import Part, Parts, Ranges

Box = tuple[slice | Sequence[tuple[int, int]], ...]
Shard = Callable[[str, tuple[int, ...], torch.dtype], Box | bool | None]
"""Says, given a tensor's name, shape and dtype, what is wanted of each dimension; None: all of it; False: none."""


def choose_parts(
    files: Sequence[_C.CheckpointFile], selection: Sequence[Sequence[int]], shard: Shard
) -> tuple[list[list[int]], Parts]:
    """Ask for each selected tensor what is wanted of it.

    Returns:
        The numbers of the tensors of which something is, and the parts.

    Raises:
        TypeError, ValueError: an answer that is no box of its tensor.
    """
    parts: dict[str, Part] = {}
    kept: list[list[int]] = []
    for file, numbers in zip(files, selection, strict=True):
        tensors: list[tuple[Any, ...]] = file.tensors()
        del file  # what `shard` raises has this frame in its traceback, and would keep the file open
        keep = []
        for number in numbers:
            name, dtype, shape = tensors[number][:3]
            answer: object = None
            if dtype in TORCH_DTYPES:  # of others the iteration complains
                shape = torch_shape(dtype, shape)
                answer = shard(name, shape, TORCH_DTYPES[dtype])
            if answer is False:
                continue
            keep.append(number)
            if answer is not None:
                parts[name] = _part(answer, name, shape)
        kept.append(keep)
    return kept, parts


def _part(answer: object, name: str, shape: Sequence[int]) -> Part:
    if not isinstance(answer, tuple):
        kind = type(answer).__name__
        what = "must be None, False or a tuple: of each dimension a slice, or a list of (begin, end)"
        raise TypeError(f"shard() of {printable(name)} {what}; not a {kind}")
    if len(answer) > len(shape):
        raise ValueError(
            f"shard() of {printable(name)} has {len(answer)} dimensions, the tensor {len(shape)}: {tuple(shape)}"
        )
    wanted = [_ranges(item, name, size) for item, size in zip(answer, shape, strict=False)]
    return (*wanted, *(((0, size),) for size in shape[len(answer) :]))


def _ranges(item: object, name: str, size: int) -> Ranges:
    if isinstance(item, slice):
        try:
            begin, end, step = item.indices(size)
        except TypeError as error:
            raise TypeError(f"shard() of {printable(name)}: {error}") from error
        if step != 1:
            raise ValueError(f"shard() of {printable(name)}: a slice of step {step}; it must be 1")
        return ((begin, max(begin, end)),)
    try:
        ranges = tuple((operator.index(begin), operator.index(end)) for begin, end in item)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        what = f"shard() of {printable(name)}: must be slices, or lists of (begin, end)"
        raise TypeError(f"{what}; not {repr(item)[:80]}") from error
    for begin, end in ranges:
        if not 0 <= begin <= end <= size:
            what = f"shard() of {printable(name)}: indices {begin} to {end} of a dimension"
            raise ValueError(f"{what} that has {size}")
    return ranges
