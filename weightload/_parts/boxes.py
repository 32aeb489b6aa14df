"""Boxes of tensors that ``rename=`` fills with others: their bounds, and whether they tile a tensor."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from weightload._base.handlers import pass_on
from weightload._parts.shards import NOTHING, Part, Ranges

Span = tuple[int, int | None]
"""Where a slice begins and ends; None: with the dimension."""
Box = tuple[int | Span, ...]
"""For each dimension, from the first: the index that is taken, which drops the dimension, or a span of them."""
Bounds = tuple[tuple[int, int], ...]
"""Begin and end in every dimension of a tensor."""

same_layers = functools.lru_cache(maxsize=1024)
"""For what is asked again and again: the layers of a model are alike."""


class NoBoxError(ValueError):
    """Why something is no box of its tensor; to be said after names."""


def parse(box: object) -> Box:
    """Make a box of what a caller says.

    Raises:
        TypeError: it is no tuple of slices and integers.
        NoBoxError: a step other than 1, a negative index, an end before its begin.
    """
    if not isinstance(box, tuple):
        raise TypeError(f"the box must be a tuple: of each dimension a slice or an index; not a {type(box).__name__}")
    return tuple(map(_parse_item, box))


def _parse_item(item: object) -> int | Span:
    if not isinstance(item, slice):
        return _index(item)
    if item.step is not None and _index(item.step) != 1:
        raise NoBoxError(f"the box has a slice of step {item.step}; it must be 1")
    begin = 0 if item.start is None else _index(item.start)
    end = None if item.stop is None else _index(item.stop)
    if end is not None and end < begin:
        raise NoBoxError(f"the box has a slice from {begin} to {end}")
    return begin, end


def _index(value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError as failed:
        pass_on(failed)
        words = "the box must have a slice of integers or an index for each dimension"
        raise TypeError(f"{words}; not {repr(value)[:80]}") from None
    if index < 0:
        raise NoBoxError(f"the box has a negative index, {index}")
    return index


@same_layers
def bounds_in(box: Box, shape: tuple[int, ...]) -> Bounds:
    """Where a box lies in a tensor of this shape.

    Raises:
        NoBoxError: it is not inside.
    """
    if len(box) > len(shape):
        raise NoBoxError(f"the box has {len(box)} dimensions, the target {len(shape)}: {tuple(shape)}")
    found = []
    for item, size in zip(box, shape, strict=False):
        begin, end = (item, item + 1) if isinstance(item, int) else item
        end = max(begin, size) if end is None else end
        if end > size:
            raise NoBoxError(f"the box ends at {end} in a dimension of {size}: the target is {tuple(shape)}")
        found.append((begin, end))
    return (*found, *((0, size) for size in shape[len(box) :]))


@same_layers
def bounds_around(box: Box, piece: tuple[int, ...]) -> Bounds:
    """Where a box lies that is as large as the piece that fills it: what has no end takes that of the piece.

    Raises:
        NoBoxError: their shapes differ.
    """
    sizes = iter(piece)
    found = []
    for item in box:
        if isinstance(item, int):
            found.append((item, item + 1))
            continue
        size = next(sizes, None)
        if size is None:
            raise NoBoxError(f"the box has more slices than the tensor has dimensions: {tuple(piece)}")
        begin, end = item
        if end is not None and end - begin != size:
            raise NoBoxError(f"the box has {end - begin} indices where the tensor has {size}: {tuple(piece)}")
        found.append((begin, begin + size))
    return (*found, *((0, size) for size in sizes))


@same_layers
def shape_of_box(box: Box, bounds: Bounds) -> tuple[int, ...]:
    """The shape of the tensor that fills a box."""
    dropped = {number for number, item in enumerate(box) if isinstance(item, int)}
    return tuple(end - begin for number, (begin, end) in enumerate(bounds) if number not in dropped)


@same_layers
def index_of(box: Box, bounds: Bounds) -> tuple[int | slice, ...]:
    """The index that gets the box of a tensor."""
    taken = {number for number, item in enumerate(box) if isinstance(item, int)}
    return tuple(begin if n in taken else slice(begin, end) for n, (begin, end) in enumerate(bounds))


@same_layers
def index_in_part(box: Box, bounds: Bounds, part: Part) -> tuple[tuple[int | slice, ...], Part | None]:
    """Find a box in a tensor's part that has its own memory: where it lies there, and which part of the box that is.

    The indices of the part rise in every dimension, so what of them is in the box follows each other in memory.

    Args:
        box, bounds: of the whole tensor.
        part: the indices that are in the memory, by dimension.

    Returns:
        What to put between brackets, and the indices of the tensor that fills the box: None for all of it, ``NOTHING``
        where they do not meet.
    """
    index: list[int | slice] = []
    mine: list[Ranges] = []
    if part is NOTHING:
        return (), NOTHING
    for number, ((begin, end), ranges) in enumerate(zip(bounds, part, strict=True)):
        runs: list[tuple[int, int]] = []
        first = at = 0
        for low, high in ranges:
            inner = max(low, begin), min(high, end)
            if inner[0] < inner[1]:
                first = first if runs else at + inner[0] - low
                runs.append((inner[0] - begin, inner[1] - begin))
            at += high - low
        if not runs:
            return (), NOTHING
        if number < len(box) and isinstance(box[number], int):
            index.append(first)
        else:
            index.append(slice(first, first + sum(high - low for low, high in runs)))
            mine.append(tuple(runs))
    whole = all(ranges == ((0, size),) for ranges, size in zip(mine, shape_of_box(box, bounds), strict=True))
    return tuple(index), None if whole else tuple(mine)


def in_words(bounds: Bounds) -> str:
    """Bounds as they are written in Python."""
    return f"[{', '.join(f'{begin}:{end}' for begin, end in bounds)}]"


class Tiling(NamedTuple):
    """How boxes lie in a tensor."""

    gap: Bounds | None
    """A box that none of them fills."""
    clash: tuple[int, int] | None
    """The numbers of two that overlap."""


@same_layers
def tiling(boxes: tuple[Bounds, ...], shape: tuple[int, ...]) -> Tiling:
    """Look for a gap between boxes that are inside of a tensor of this shape, and for an overlap.

    Goes through the dimensions that are cut, and in each from edge to edge. That takes as long as sorting them, but for
    boxes that are long in one dimension and lie staggered.
    """
    filled = [number for number, box in enumerate(boxes) if all(begin < end for begin, end in box)]
    cut = [d for d, size in enumerate(shape) if any(boxes[number][d] != (0, size) for number in filled)]
    found: list[Bounds] = []

    def sweep(inside: Sequence[int], done: dict[int, tuple[int, int]]) -> tuple[int, int] | None:
        if not inside:
            found.append(tuple(done.get(d, (0, size)) for d, size in enumerate(shape)))
            return None
        if len(done) == len(cut):
            return (inside[0], inside[1]) if len(inside) > 1 else None
        dimension = cut[len(done)]
        waiting = sorted(inside, key=lambda number: boxes[number][dimension], reverse=True)
        edges = {end for number in inside for end in boxes[number][dimension]}
        running: list[int] = []
        for low, high in itertools.pairwise(sorted(edges.union((0, shape[dimension])))):
            running = [number for number in running if boxes[number][dimension][1] > low]
            while waiting and boxes[waiting[-1]][dimension][0] == low:
                running.append(waiting.pop())
            if clash := sweep(running, {**done, dimension: (low, high)}):
                return clash
        return None

    clash = sweep(filled, {}) if all(shape) else None
    return Tiling(found[0] if found else None, clash)
