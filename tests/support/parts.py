"""What the tests of parts of tensors share."""

from __future__ import annotations

from typing import Any

import torch


def cut(tensor: torch.Tensor, box: Any) -> torch.Tensor:
    """What torch makes of a box as ``shard=`` answers it: None, or a slice or a list of ranges for each dimension."""
    for dimension, item in enumerate(box or ()):
        pieces = [item] if isinstance(item, slice) else [slice(*ends) for ends in item]
        tensor = torch.cat([tensor[(slice(None),) * dimension + (piece,)] for piece in pieces], dimension)
    return tensor
