"""An event loop that knows which of its futures the library's threads still have.

Each request is a future of the loop, which a thread of the library (Rust's tokio) fulfils: it takes the GIL, and calls
the loop. Up to Python 3.13 a thread that wants the GIL back when the interpreter has begun to end is unwound, and Rust
ends the process where that comes through it (SIGABRT, without a word). So the interpreter must not end before those
threads are done, and the library tells nobody when they are. But they hold their future until then.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import Any

from weightload._remote.stores import library

SECONDS_BETWEEN_LOOKS = 0.002


class CountingLoop(asyncio.SelectorEventLoop):
    """Keeps count of its futures, without keeping them."""

    def __init__(self) -> None:
        super().__init__()
        self._futures: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()

    def create_future(self) -> asyncio.Future[Any]:
        future = super().create_future()
        self._futures.add(future)
        return future

    def run_until_no_futures(self, seconds: float) -> None:
        """Run until nobody holds a future any more, so long at most. For the end, when nothing new is asked for."""
        end = time.monotonic() + seconds
        while self._futures and time.monotonic() < end:
            # The library frees, when it is called next, what its threads let go of without the GIL.
            library().store.MemoryStore()
            self.call_later(SECONDS_BETWEEN_LOOKS, self.stop)
            self.run_forever()
