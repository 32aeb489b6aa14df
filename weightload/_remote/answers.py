"""What a request brings, as the core's threads wait for it: see csrc/bindings/remote_source.h."""

from __future__ import annotations

import concurrent.futures
from typing import Any

from weightload._base.handlers import pass_on
from weightload.errors import ReadError, located

FIRST_BYTES = 256 << 10  # of the first request: most files' whole header
# A body that ends early, or stands still, is asked for again so often, with a pause that doubles.
ATTEMPTS = 5
FIRST_PAUSE = 0.1  # seconds


class Answer:
    """What a request will bring. For the core's threads, see csrc/bindings/remote_source.h."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    def wait(self, seconds: float) -> bool:
        """Whether it has come, or failed."""
        if not self._future.done():
            try:
                self._future.exception(seconds)
            except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError) as not_yet:
                pass_on(not_yet)
        return self._future.done()

    def bytes(self) -> Any:
        try:
            return self._future.result()
        except concurrent.futures.CancelledError as cancelled:
            pass_on(cancelled)
            raise ReadError("the request was broken off") from None

    def cancel(self) -> None:
        self._future.cancel()


class InHand:
    """An answer that needs no request."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def wait(self, seconds: float) -> bool:
        return True

    def bytes(self) -> Any:
        return self._data

    def cancel(self) -> None:
        pass


def require_plain(answer: Any, where: str) -> None:
    """Refuse what the server has packed on the way: its ranges are not those of the file."""
    packed = dict(answer.attributes).get("Content-Encoding")
    if packed and packed != "identity":
        what = f"{where}: the server packs it on the way (Content-Encoding: {packed}), so no range of it can be read"
        raise located(ReadError(what), where)
