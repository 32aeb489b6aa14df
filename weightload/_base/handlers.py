"""Signal handlers: what they raise is for the caller, whatever is being forgiven when they run."""

from __future__ import annotations

import functools
import signal
from types import CodeType, TracebackType


def pass_on(error: BaseException) -> None:
    """Raise an exception again if a signal handler raised it.

    For every ``except`` that goes on after an error: Python runs handlers between any two of its instructions, so also
    in a ``try`` whose statement fails in well-known ways. What a handler raises has gone through the handler's frame.
    """
    codes: set[CodeType] | None = None
    trace = error.__traceback__
    while trace is not None:
        if codes is None:
            codes = _codes_of_handlers()
        if trace.tb_frame.f_code in codes:
            try:
                raise error
            finally:
                del error, trace  # its traceback has this frame in it now: they would hold each other
        trace = trace.tb_next


def _codes_of_handlers() -> set[CodeType]:
    found = set()
    for number in signal.valid_signals():
        handler: object = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        called = vars(type(handler)).get("__call__")  # of an object that is no function
        code = getattr(handler, "__code__", None) or getattr(called, "__code__", None)
        if isinstance(code, CodeType):
            found.add(code)
    return found


class forgiven:
    """``contextlib.suppress``, but for what a signal handler raises."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not isinstance(error, self._kinds):
            return False
        pass_on(error)
        return True
