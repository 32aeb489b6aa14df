"""Tensors of each file by name, as the engines' own iterators give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from weightload import _C
from weightload._checkpoint.selection import Names, open_files, select_all


def in_name_order(
    weights: Iterator[tuple[str, torch.Tensor]], files: Sequence[str], names: Names | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hold a tensor until those of its file that come before it by name are there.

    Models rely on it: a weight and its scale, which lie apart in the file as their dtypes differ, come together.
    Tensors of one dtype mostly lie by name, and are not held. ``files``, ``names``: those of ``weights``, which has a
    name that several files have from the last of them.
    """
    opened = open_files(list(files))
    selection = select_all(opened, names, "last")
    order = [name for file, numbers in zip(opened, selection, strict=True) for name in _sorted_names(file, numbers)]
    del opened
    held: dict[str, torch.Tensor] = {}
    for name in order:
        while name not in held:
            found, tensor = next(weights)
            held[found] = tensor
            del tensor
        yield name, held.pop(name)
    yield from weights  # nothing is left but how the load ends


def _sorted_names(file: _C.CheckpointFile, numbers: Sequence[int]) -> list[str]:
    names = file.names()
    return sorted(names[number] for number in numbers)
