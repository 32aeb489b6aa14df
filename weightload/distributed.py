"""What this process knows of the others: its rank, and whether a load would have to involve them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch.distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Strategy = Literal["auto", "independent", "broadcast", "striped"]
STRATEGIES: tuple[str, ...] = ("auto", "independent", "broadcast", "striped")


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def global_rank() -> int:
    """This process's rank: torch.distributed's, else the launcher's RANK, else 0."""
    if _initialised():
        return torch.distributed.get_rank()
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def group_size(group: ProcessGroup | None) -> int:
    """Ranks of the group; of all of torch.distributed for None; 1 where it is not initialised."""
    return torch.distributed.get_world_size(group) if _initialised() else 1


def require_independent(strategy: str, broadcast: bool, group: ProcessGroup | None) -> None:
    """Accept loads in which this process reads everything itself, which is all there is so far.

    Raises:
        ValueError: no such strategy.
        NotImplementedError: more than one rank, and the call asks them to share the reading.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: must be one of {', '.join(STRATEGIES)}")
    shared = strategy in ("broadcast", "striped") or (strategy == "auto" and broadcast)
    if shared and group_size(group) > 1:
        raise NotImplementedError(
            "weightload cannot yet share the reading between the ranks of a group (strategies broadcast and "
            "striped); pass to_cpu=True, broadcast=False or strategy='independent' to read on every rank"
        )
