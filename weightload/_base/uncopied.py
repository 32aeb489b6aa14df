"""Things of which there is one: a load, and what stands for it."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex, TypeVar

_Self = TypeVar("_Self", bound="StandsForALoad")


class Uncopied:
    """Neither copied nor pickled: two would draw from one load, each half of its tensors."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"cannot pickle or copy a {type(self).__name__}")


class StandsForALoad(Uncopied):
    """An iterator over another's items, and a context manager that closes it."""

    def __iter__(self: _Self) -> _Self:
        return self

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the load."""
        raise NotImplementedError
