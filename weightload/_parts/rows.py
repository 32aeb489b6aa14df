"""Which rows of a tensor an index needs, so that no others are read.

Nothing here leaves a device or dtype to a default, nor calls a constructor of torch that libraries replace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from weightload._base.handlers import pass_on
from weightload._parts.shards import Part

# Tensors that are their elements.
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
# Between rows that lie closer than this the kernel reads on anyway.
PAGE = 4096


Run = tuple[int, int]  # begin and end


class Rows(NamedTuple):
    """The rows to read of a tensor, and those to pick from them."""

    runs: list[Run] | None
    """Runs of rows, ascending and apart; None for all rows."""
    index: Any
    """Picks from these rows, one run behind the other, what was asked of the tensor."""


def is_basic(index: Any) -> bool:
    """Whether torch makes a view of it, without looking at an element."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)


def plan_rows(index: Any, shape: Sequence[int], row_bytes: int) -> Rows:
    """Split ``tensor[index]`` into rows to read and an index into those.

    Args:
        index: anything that torch takes between brackets.
        shape: the tensor's, as torch counts it.
        row_bytes: of one row. Runs with less than a page between them become one.

    Raises:
        IndexError, TypeError, ValueError: torch's own, for an index that does not fit.
    """
    if isinstance(index, slice) and index.step in (None, 1) and shape:
        begin, end, _ = index.indices(shape[0])
        return Rows([(begin, max(begin, end))], slice(None))
    if is_basic(index):
        try_index(index, shape)
    everything = Rows(None, index)
    if isinstance(index, list) and not all(isinstance(item, int) for item in index):
        return everything  # what torch makes of nested lists depends on its version
    items = list(index) if isinstance(index, tuple) else [index]
    at = first_dimension(items, len(shape))
    if at is None:
        return everything
    planned = _of_slice(items[at], shape[0], row_bytes) or _of_array(items[at], shape, row_bytes)
    if planned is None:
        return everything
    items[at] = planned.index
    return Rows(planned.runs, tuple(items))


def box_of(index: Any, shape: Sequence[int]) -> Part | None:
    """The part of a tensor that a tuple of slices asks for, if it is less than whole rows; None where it is not that.

    Args:
        index: as for ``plan_rows``, which has looked at it.
        shape: the tensor's, as torch counts it.
    """
    if not isinstance(index, tuple) or not 1 < len(index) <= len(shape):
        return None
    ranges = []
    for item, size in zip((*index, *[slice(None)] * (len(shape) - len(index))), shape, strict=True):
        if not isinstance(item, slice) or item.step not in (None, 1):
            return None
        begin, end, _ = item.indices(size)
        ranges.append(((begin, max(begin, end)),))
    inner = zip(ranges[1:], shape[1:], strict=True)
    return None if all(((0, size),) == wanted for wanted, size in inner) else tuple(ranges)


def try_index(index: Any, shape: Sequence[int]) -> None:
    """Raise what torch does of an index, without an element being read."""
    torch.as_tensor(0, dtype=torch.uint8, device="cpu").expand(tuple(shape))[index]


def first_dimension(items: Sequence[Any], dimensions: int) -> int | None:
    """Which item is about the first of a tensor's ``dimensions``; None if none restricts it."""
    if dimensions == 0:
        return None
    for at, item in enumerate(items):
        if item is None:
            continue
        if item is Ellipsis:
            if sum(map(_dimensions, items[at + 1 :])) < dimensions:
                return None
            continue
        # A single truth value adds a dimension, as None does, and may leave nothing: rare, and not worth more.
        return None if _dimensions(item) == 0 else at
    return None


def about_last_dimension(index: Any, dimensions: int) -> bool:
    """Whether an index picks from the last of a tensor's ``dimensions``, and does not take all of it."""
    items = list(index) if isinstance(index, tuple) else [index]
    at = next((at for at, item in enumerate(items) if item is Ellipsis), None)
    behind = [] if at is None else [item for item in items[at + 1 :] if _dimensions(item)]
    if not behind and sum(map(_dimensions, items)) == dimensions:
        behind = [item for item in items if _dimensions(item)]
    return bool(behind) and not (isinstance(behind[-1], slice) and behind[-1] == slice(None))


def _dimensions(item: Any) -> int:
    """Dimensions of the tensor that an item is about."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, (int, slice)):
        return 1
    array = _as_tensor(item)
    return array.ndim if array is not None and array.dtype is torch.bool else 1


def _as_tensor(item: Any) -> torch.Tensor | None:
    """An array of whole numbers or truth values, as torch understands it; None for what is torch's to judge."""
    if isinstance(item, torch.Tensor) and type(item) not in PLAIN:
        return None  # it may have no elements, as a fake tensor
    try:
        array = torch.as_tensor(item, device="cpu")
    except (TypeError, ValueError, RuntimeError) as failed:
        pass_on(failed)
        return None
    if isinstance(item, torch.Tensor) and array.dtype not in (torch.int64, torch.int32, torch.bool):
        return None
    if isinstance(item, list) and array.numel() == 0:  # torch indexes with [] as with a list of whole numbers
        return array.to(torch.long)
    if array.dtype is torch.bool:
        return array
    return None if array.is_floating_point() or array.is_complex() else array.to(torch.long)


def _of_slice(item: Any, count: int, row_bytes: int) -> Rows | None:
    if not isinstance(item, slice):
        return None
    rows = range(*item.indices(count))
    if not rows or rows.step < 0:
        return Rows([(0, 0)], slice(None)) if rows.step > 0 else None
    if (rows.step - 1) * row_bytes < PAGE:
        return Rows([(rows[0], rows[-1] + 1)], slice(None, None, rows.step))
    return Rows([(row, row + 1) for row in rows], slice(None))


def _of_array(item: Any, shape: Sequence[int], row_bytes: int) -> Rows | None:
    if isinstance(item, int) and not isinstance(item, bool) and -shape[0] <= item < shape[0]:
        return Rows([(item % shape[0], item % shape[0] + 1)], 0)
    array = None if isinstance(item, slice) else _as_tensor(item)
    if array is None:
        return None
    if array.dtype is torch.bool:
        if list(array.shape) != list(shape[: array.ndim]):
            return None
        runs = _runs((array.flatten(1).any(1) if array.ndim > 1 else array).nonzero().flatten(), row_bytes)
        return Rows(_pairs(runs), array[_rows_of(runs)])
    count = shape[0]
    if array.numel() and not (-count <= int(array.min()) and int(array.max()) < count):
        return None
    if array.ndim == 0:
        row = int(array) % count
        return Rows([(row, row + 1)], 0)
    array = torch.where(array < 0, array + count, array)
    runs = _runs(torch.unique(array), row_bytes)
    which = torch.searchsorted(runs[:, 0].contiguous(), array, right=True) - 1
    return Rows(_pairs(runs), array - runs[which, 0] + _places(runs)[which])


def _pairs(runs: torch.Tensor) -> list[Run]:
    return list(map(tuple, runs.tolist()))


def _places(runs: torch.Tensor) -> torch.Tensor:
    """Where each run begins, one behind the other."""
    lengths = runs[:, 1] - runs[:, 0]
    return lengths.cumsum(0) - lengths


def _rows_of(runs: torch.Tensor) -> torch.Tensor:
    """The numbers of all rows in runs."""
    lengths = runs[:, 1] - runs[:, 0]
    counted = lengths.new_ones(int(lengths.sum())).cumsum(0) - 1
    return torch.repeat_interleave(runs[:, 0] - _places(runs), lengths) + counted


def _runs(rows: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """Ascending numbers as (n, 2) beginnings and ends of runs, with a page or more between them."""
    if rows.numel() == 0:
        return rows.new_zeros((1, 2))
    ends = (rows[1:] - rows[:-1] - 1) * row_bytes >= PAGE
    edge = ends.new_ones(1)
    last = torch.cat([ends, edge])
    first = torch.cat([edge, ends])
    return torch.stack([rows[first], rows[last] + 1], 1)
