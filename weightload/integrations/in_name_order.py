"""Tensors of each file by name, as the engines' own iterators give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from weightload._checkpoint.selection import open_files


def in_name_order(
    weights: Iterator[tuple[str, torch.Tensor]], files: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hold the tensors of a file until all of them are there.

    Models rely on it: a weight and its scale, which lie apart in the file as their dtypes differ, come together.
    ``files``: where a name is in several of them, ``weights`` has that of the last.
    """
    home = {name: number for number, file in enumerate(open_files(list(files))) for name in file.names()}
    held: dict[str, torch.Tensor] = {}
    at: int | None = None
    for name, tensor in weights:
        if home[name] != at:
            yield from _by_name(held)
            at = home[name]
        held[name] = tensor
        del tensor
    yield from _by_name(held)


def _by_name(held: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(held):
        yield name, held.pop(name)
