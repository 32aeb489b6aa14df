"""Loads with ``cache=``: whose copies they use and fill, alone or with other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightload import _C
from weightload._base.addresses import is_address, shown
from weightload._base.paths import Path, as_text
from weightload._base.uncopied import Load, StandsForALoad
from weightload._group.ranks import load_name, node_of_this_process, tell_all

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from weightload._cache.folder import Cache


def require_cache(cache: Path | None) -> str | None:
    """The folder that ``cache=`` names.

    Raises:
        TypeError, FileNotFoundError, ValueError: it can be none.
    """
    if cache is None:
        return None
    folder = as_text(cache)
    if is_address(folder):
        raise ValueError(f"cache={shown(folder)!r}: must be a folder of this machine's")
    return folder


def cache_of(
    folder: str | None,
    paths: Sequence[str],
    *,
    fill: bool,
    at_end: bool = False,
    group: ProcessGroup | None = None,
    shared: bool = False,
) -> Cache | None:
    """The folder of copies for a load; None where it asks no server. Of ranks that share it a collective call.

    ``fill``: whether it reads its files whole, and may write. ``at_end``: not before its end.
    """
    if folder is None or not any(map(is_address, paths)):
        return None
    from weightload._cache.folder import Cache  # here: most never need it

    if group is None or not shared:
        cache = Cache(folder, fill=fill, at_end=at_end)
    else:
        stage = f"{load_name(paths)}, its cache="
        cache = Cache(
            folder,
            fill=fill,
            at_end=at_end,
            agree=lambda mine: tell_all(group, stage, mine),
            rank=group.rank(),
            node=node_of_this_process(),
        )
    cache.prepare(paths)
    return cache


def using(cache: Cache | None) -> contextlib.AbstractContextManager[object]:
    """A block in which the load runs."""
    return contextlib.nullcontext() if cache is None else cache


class CachedWeights(StandsForALoad):
    """A load's items, of which copies are written; they are whole when it ends. Otherwise as the load itself."""

    __del__ = _C.finish  # close(): a loop that was left early leaves nothing in the folder that is not whole

    def __init__(self, weights: Load, cache: Cache) -> None:
        super().__init__(weights)
        self._cache = cache

    def __next__(self) -> tuple[str, torch.Tensor]:
        try:
            return next(self._weights)
        except StopIteration:
            try:
                self._cache.finish()
            finally:
                self._cache.close()
            raise
        except BaseException as error:
            self._weights.close()
            self._cache.stop(error)
            raise

    def close(self) -> None:
        """Stop the load and the writing."""
        super().close()
        self._cache.close()
