"""A tqdm bar over a load, in bytes, or over other work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weightload import _C
from weightload._base import terminal
from weightload._base.handlers import pass_on
from weightload._base.plain_torch import plainly
from weightload._base.uncopied import Load, StandsForALoad
from weightload._group.ranks import global_rank

if TYPE_CHECKING:
    import torch

Advance = Callable[[int], object]

# A load that is over before a person could read the bar shows none.
SECONDS_BEFORE_THE_BAR = 1.0


def wanted(show_progress: bool | None) -> bool:
    """Whether to show a bar: on rank 0, where stderr can be written; by default only where it is a terminal."""
    if show_progress is False or global_rank() != 0:
        return False
    return terminal.is_terminal(sys.stderr) if show_progress is None else terminal.can_write(sys.stderr)


def _bar(total: int, always: bool, what: str = "Loading weights", unit: str = "B") -> Any:
    try:
        from tqdm.auto import tqdm

        # tqdm's own finaliser is Python code, in which the exception of a signal handler is lost; and starting its
        # thread, which looks after bars that are told little, is in a try statement that forgives all.
        bar = type("Bar", (tqdm,), {"__del__": _C.finish, "monitor_interval": 0})
        return bar(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1000,
            miniters=1,
            delay=0 if always else SECONDS_BEFORE_THE_BAR,
            file=terminal.Forgiving(sys.stderr),
        )
    except Exception as failed:  # a notebook without widgets, a stream unlike others: no bar is worth a load
        pass_on(failed)
        return NoBar()


class NoBar:
    """In the place of a bar that could not be made."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""


@plainly
def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.nbytes


class WeightsWithBar(StandsForALoad):
    """A load's items, with a bar; otherwise as the load itself. Leaving early closes the load.

    Args:
        weights: the load.
        always: show the bar from the start, not only once the load has lasted a second.
    """

    def __init__(self, weights: Load, always: bool) -> None:
        super().__init__(weights)
        self._bar = _bar(weights.total_bytes, always)

    def __next__(self) -> tuple[str, torch.Tensor]:
        try:
            name, tensor = next(self._weights)
        except BaseException:  # the end, too
            self._bar.close()
            raise
        try:
            self._bar.update(_bytes_of(tensor))
        except BaseException:  # such as Ctrl-C: a caller that goes on would not have this tensor
            self.close()
            raise
        return name, tensor

    def close(self) -> None:
        """Stop the load, also one that another thread waits in, and take the bar away."""
        super().close()
        self._bar.close()


def unseen(_: int) -> None:
    """Stands for a bar where there is none."""


@contextmanager
def bar(total: int, show_progress: bool | None, what: str = "Loading weights", unit: str = "B") -> Iterator[Advance]:
    """A function to call with bytes as they are loaded (or with what ``unit`` counts), and a bar if one is wanted."""
    if not wanted(show_progress):
        yield unseen
        return
    with _bar(total, show_progress is True, what, unit) as shown:
        yield shown.update
