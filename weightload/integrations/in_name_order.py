"""Tensors of each file by name, as the engines' own iterators give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import weightload


def in_name_order(
    weights: Iterator[tuple[str, torch.Tensor]], files: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hold the tensors of a file until all of them are there.

    Models rely on it: a weight and its scale, which lie apart in the file as their dtypes differ, come together.
    ``files``: where a name is in several of them, ``weights`` has that of the last.
    """
    home: dict[str, int] = {}
    for number, file in enumerate(files):
        with weightload.safe_open(file, "pt") as handle:
            home.update(dict.fromkeys(handle.offset_keys(), number))
    held: dict[str, torch.Tensor] = {}
    at: int | None = None
    for name, tensor in weights:
        if home.get(name) != at:
            at = home.get(name)
            yield from sorted(held.items(), key=lambda item: item[0])
            held.clear()
        held[name] = tensor
        del tensor
    yield from sorted(held.items(), key=lambda item: item[0])
