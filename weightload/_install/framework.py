"""Facts about a framework that serving it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable


@dataclasses.dataclass(frozen=True)
class Framework:
    """A package that loads by safetensors."""

    package: str
    """Its name when it is imported; its distribution has the same, with hyphens."""
    sites: tuple[tuple[str, str], ...]
    """Where it reads weights: modules, and their names for what is replaced. If one is not there, or is something else,
    the version is one that nobody has looked at."""
    pairs: Callable[[], Iterable[tuple[object, object]]] = tuple
    """More that is replaced in its modules, and by what; called when it is imported."""
