"""Things of which there is one: a load, what stands for it, and the process that it was begun in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn, Protocol, SupportsIndex, TypeVar

if TYPE_CHECKING:
    import torch

    from weightload._base.load_stats import LoadStats

_Self = TypeVar("_Self", bound="StandsForALoad")


class Process:
    """The one that this was made in. Its forked children have none of its threads, but locks that nobody gives back."""

    def __init__(self) -> None:
        self._number = os.getpid()

    def is_parent(self) -> bool:
        """Whether this is a forked child of it."""
        return os.getpid() != self._number


class Uncopied:
    """Neither copied nor pickled: two would draw from one load, each half of its tensors."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"cannot pickle or copy a {type(self).__name__}")


class Load(Protocol):
    """One of the core's, or what stands for it."""

    @property
    def agreement_seconds(self) -> float:
        """Seconds that agreeing with other ranks took."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all its tensors."""

    def __next__(self) -> tuple[str, torch.Tensor]: ...

    def __len__(self) -> int: ...

    def close(self) -> None:
        """Stop it."""

    def stats(self) -> LoadStats:
        """Its counts so far."""


class StandsForALoad(Uncopied):
    """An iterator over another's items, and a context manager that closes it; otherwise as the other itself."""

    def __init__(self, weights: Load) -> None:
        self._weights = weights
        self.agreement_seconds = weights.agreement_seconds
        self.total_bytes = weights.total_bytes

    def __iter__(self: _Self) -> _Self:
        return self

    def __len__(self) -> int:
        return len(self._weights)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the load, also one that another thread waits in."""
        self._weights.close()

    def stats(self) -> LoadStats:
        """Statistics of the load so far."""
        return self._weights.stats()
