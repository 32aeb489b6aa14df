"""What a request brings, as the core's threads wait for it: see csrc/bindings/remote_source.h."""

from __future__ import annotations

import concurrent.futures
from typing import Any

from weightload.errors import ReadError, located


class Answer:
    """What a request will bring. For the core's threads, see csrc/bindings/remote_source.h."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    def wait(self, seconds: float) -> bool:
        """Whether it has come, or failed."""
        try:
            self._future.exception(seconds)
        except concurrent.futures.TimeoutError:
            return self._future.done()
        except concurrent.futures.CancelledError:
            return True
        return True

    def bytes(self) -> Any:
        try:
            return self._future.result()
        except concurrent.futures.CancelledError:
            raise ReadError("the interpreter is exiting") from None

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
