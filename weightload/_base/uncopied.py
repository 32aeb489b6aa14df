"""Things of which there is one: a load, and what stands for it."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex


class Uncopied:
    """Neither copied nor pickled: two would draw from one load, each half of its tensors."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"cannot pickle or copy a {type(self).__name__}")
