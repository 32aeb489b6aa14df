"""Which rows of a tensor an index needs, so that no others are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Run = tuple[int, int]


def plan_rows(index: Any, shape: Sequence[int]) -> tuple[list[Run] | None, Any]:
    """Split ``tensor[index]`` into rows to read and an index into those.

    Args:
        index: anything that torch takes between brackets.
        shape: the tensor's, as torch counts it.

    Returns:
        Runs ``(begin, end)`` of rows of the first dimension, ascending and apart; None for all rows. And the index
        that picks from these rows, one run behind the other, what ``index`` picks from the tensor.

    Raises:
        IndexError, TypeError, ValueError: torch's own, for an index that does not fit.
    """
    if isinstance(index, list) and not all(isinstance(item, int) for item in index):
        return None, index  # what torch makes of nested lists depends on its version
    items = list(index) if isinstance(index, tuple) else [index]
    if all(_is_basic(item) for item in items):
        _try(index, shape)  # costs nothing, reads nothing, and raises what torch does
    at = _first_dimension(items, len(shape))
    if at is None:
        return None, index
    runs, items[at] = _rows(items[at], shape, index)
    return runs, (tuple(items) if runs is not None else index)


def _is_basic(item: Any) -> bool:
    return item is None or item is Ellipsis or isinstance(item, (int, slice))


def _try(index: Any, shape: Sequence[int]) -> None:
    torch.empty((), dtype=torch.uint8).expand(tuple(shape))[index]


def _first_dimension(items: list[Any], dimensions: int) -> int | None:
    """Which item is about the first dimension; None if none restricts it."""
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


def _dimensions(item: Any) -> int:
    """Dimensions of the tensor that an item is about."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, (int, slice)):
        return 1
    array = _as_tensor(item)
    if array is None or array.dtype != torch.bool:
        return 1
    return array.ndim


def _as_tensor(item: Any) -> torch.Tensor | None:
    try:
        array = torch.as_tensor(item, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    # torch indexes with [] as with a list of whole numbers.
    return array.to(torch.long) if isinstance(item, list) and array.numel() == 0 else array


def _rows(item: Any, shape: Sequence[int], index: Any) -> tuple[list[Run] | None, Any]:
    """Runs of rows for the item about the first dimension, and the item that takes its place."""
    count = shape[0]
    if isinstance(item, slice):
        rows = range(*item.indices(count))
        if not rows:
            return [(0, 0)], slice(None)
        return ([(rows[0], rows[-1] + 1)] if rows.step == 1 else [(row, row + 1) for row in rows]), slice(None)
    array = _as_tensor(item)
    if array is None or array.dtype == torch.uint8 or array.is_floating_point() or array.is_complex():
        return None, item  # for torch to judge
    if array.dtype == torch.bool:
        if list(array.shape) != list(shape[: array.ndim]):
            _try(index, shape)
            return None, item
        wanted = array.flatten(1).any(1) if array.ndim > 1 else array
        rows_there = wanted.nonzero().flatten()
        return _runs(rows_there.tolist()), array[rows_there]
    if array.numel() and not (-count <= int(array.min()) and int(array.max()) < count):
        _try(index, shape)
        return None, item
    if array.ndim == 0:
        row = int(array) % count
        return [(row, row + 1)], 0
    wanted, place = torch.unique(torch.where(array < 0, array + count, array), return_inverse=True)
    return _runs(wanted.tolist()), place.reshape(array.shape)


def _runs(rows: list[int]) -> list[Run]:
    """Ascending numbers as runs without gaps."""
    runs: list[Run] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs or [(0, 0)]
