"""Shared by the tests of ``rename=``: tensors cut into pieces, and the answers that put them together."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Bounds = tuple[tuple[int, int], ...]


def cuts(chance: random.Random, shape: Sequence[int]) -> list[Bounds]:
    """Boxes that tile a tensor of this shape, in any order."""
    done: list[Bounds] = []
    waiting: list[Bounds] = [tuple((0, size) for size in shape)]
    while waiting:
        box = waiting.pop()
        wide = [number for number, (begin, end) in enumerate(box) if end - begin > 1]
        if not wide or (len(done) + len(waiting) > 0 and chance.random() < 0.4):
            done.append(box)
            continue
        number = chance.choice(wide)
        begin, end = box[number]
        at = chance.randrange(begin + 1, end)
        for ends in ((begin, at), (at, end)):
            waiting.append((*box[:number], ends, *box[number + 1 :]))
    chance.shuffle(done)
    return done


def as_box(chance: random.Random, bounds: Bounds, shape: Sequence[int]) -> tuple[Any, ...]:
    """A box as a caller may write it."""
    box: list[Any] = []
    for (begin, end), size in zip(bounds, shape, strict=True):
        ways: list[Any] = [slice(begin, end), slice(begin, end, 1)]
        if end - begin == 1:
            ways += [begin] * 2
        if end == size:
            ways.append(slice(begin, None))
        if begin == 0:
            ways.append(slice(None, end))
        if (begin, end) == (0, size):
            ways.append(slice(None))
        box.append(chance.choice(ways))
    while box and box[-1] == slice(None) and chance.random() < 0.5:
        box.pop()
    return tuple(box)


def index_of(box: tuple[Any, ...], bounds: Bounds) -> tuple[Any, ...]:
    """Return the index with which torch takes a box. Its slices may end where they begin."""
    return tuple(
        begin if n < len(box) and isinstance(box[n], int) else slice(begin, end)
        for n, (begin, end) in enumerate(bounds)
    )


def numbers(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """No two alike, as far as the dtype has as many."""
    return (torch.arange(math.prod(shape)) % 251).reshape(tuple(shape)).to(dtype)


class Cut:
    """A checkpoint of tensors that were cut into pieces, and of some that were not."""

    def __init__(self, chance: random.Random, whole: dict[str, torch.Tensor]) -> None:
        self.whole, self.answers = whole, {}
        self.pieces: dict[str, torch.Tensor] = {}
        for name, tensor in whole.items():
            if chance.random() < 0.2:
                self.pieces[f"{name}.old"], self.answers[f"{name}.old"] = tensor, name
                continue
            for number, bounds in enumerate(cuts(chance, tensor.shape)):
                box = as_box(chance, bounds, tensor.shape)
                piece = f"{name}.{number}"
                self.pieces[piece] = tensor[index_of(box, bounds)].clone().contiguous()
                self.answers[piece] = (name, box)
        order = list(self.pieces)
        chance.shuffle(order)
        self.order = order

    answers: dict[str, Any]

    def save(self, folder: Path, files: int = 1) -> list[Path]:
        """Save the pieces in ``files`` files."""
        paths = []
        for number in range(files):
            path = folder / f"{number}.safetensors"
            safetensors.torch.save_file({name: self.pieces[name] for name in self.order[number::files]}, path)
            paths.append(path)
        return paths


QKV = {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16)}


def fuse(name: str) -> Any:
    """``*.q.weight`` and the like of grouped-query attention into ``*.qkv.weight``; experts into a stack; no rotary."""
    head, _, last = name.rpartition(".")
    above, _, part = head.rpartition(".")
    if part in QKV:
        return f"{above}.qkv.{last}", (QKV[part],)
    if last == "experts":
        return f"{above}.{last}", (int(part),)
    return None if last == "inv_freq" else name.removeprefix("model.")
