"""Indices of tensors of up to three dimensions, as torch takes or refuses them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

BASIC = [
    slice(None), (), slice(2), slice(None, -1), slice(1, 100), slice(5, 2), slice(0, 7, 3), slice(-4, None, 2), 0, -1,
    3, (slice(None), slice(1, 3)), (0, slice(None, 2)), (slice(2, None), -1), (..., 1), ..., None, (None, 2),
    (2, None), (slice(1, 3), ..., slice(None, None, 2)), (None, ..., None), True, False, (True, 1),
]  # fmt: skip
ADVANCED = [
    [], [0], [3, 1, 1], [-1, 0], torch.tensor([2, 0]), torch.tensor([[1, 2], [0, 0]]), torch.tensor(2),
    torch.tensor(-1), ([0, 1], [2, 2]), (slice(1, 4), [0, 1]), ([1, 2], None, slice(2)), (2, [0, 1]),
    ([2, 0], 1), (..., [0, 2]), torch.tensor([], dtype=torch.long), (None, [1, 2]), torch.tensor(True),
    np.array([2, 0], dtype=np.uint16), np.int64(1), np.array([[1], [0]]), torch.tensor([1, 0], dtype=torch.int32),
]  # fmt: skip
WRONG = [
    7, -8, (0, 5), (0, 0, 0, 0), [7], [-8], (slice(None), [9]), "x", 1.5, slice(None, None, -1), slice(1.5),
    torch.tensor([1], dtype=torch.int8), (slice(None, None, -1), torch.tensor([0])),
    torch.tensor([True]), torch.tensor([0.5]), (1, "y"), (..., ...), torch.ones(7, 4, dtype=torch.bool),
]  # fmt: skip


def masks(shape: list[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(shape, generator=generator) > 0.6
    return [some, some[..., 0], torch.zeros_like(some), (some[..., 0], slice(None)), some[..., 0].tolist()]
