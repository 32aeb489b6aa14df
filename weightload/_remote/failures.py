"""Translates the library's exceptions into our words and classes, without the secrets of an address."""

from __future__ import annotations

import errno
import re
from http import HTTPStatus

from weightload.errors import ReadError, WeightLoadError, located

CHANGED = "the object was changed while it was read"
CUT_OFF = "the answer was cut off"
LATE = "the server did not answer in time"
ANOTHER_RANGE = "the server gave another range than it was asked for"

_STATUS = re.compile(r"status code: (\d{3})")

# Words in the text of a failure that the library takes for one that may pass.
_TRIED_AGAIN = re.compile(r"after [1-9]\d* retries")
# Words in the text of any failure that say nothing of its cause: addresses, and the library's own limits.
_BESIDE = re.compile(r"https?://\S*|retry_timeout: \w+")

# Where machines of a cloud are asked for credentials, when there are no others.
_METADATA = ("/latest/api/token", "/latest/meta-data", "/metadata/identity", "/computemetadata/")

# Words of a failure's sources, and what we say then.
_SOURCES = (
    ("unexpectedrange", ANOTHER_RANGE),
    ("missinglastmodified", "the server does not say when the object was changed"),
    ("missingetag", "the server gives the object no tag"),
    ("range request not supported", "the server gives no ranges of it"),
    ("toomanyredirects", "the server sends on in a circle"),
    ("dns error", "the server's name is not known"),
    ("connection refused", "the server refuses connections"),
    ("certificate", "the server's certificate is not trusted"),
    ("timed out", LATE),
    ("timeout", LATE),
    ("connection reset", "the connection was reset"),
    ("error decoding response body", CUT_OFF),
    ("incompletemessage", CUT_OFF),
    ("incompletebody", CUT_OFF),
    ("unexpected eof", CUT_OFF),
    ("connectionclosed", "the connection was closed"),
    ("error sending request", "the server cannot be reached"),
)


def read_error(where: str, what: str) -> ReadError:
    """The error about what is shown as ``where``."""
    return located(ReadError(f"{where}: {what}"), where)


def status_of(error: BaseException) -> int | None:
    """The status of HTTP that an exception of the library's is about."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def may_pass(error: BaseException) -> bool:
    """Whether the library has tried it again, and in vain; not where it has waited long for an answer."""
    return bool(_TRIED_AGAIN.search(str(error))) and reason_of(error) != LATE


def translated(error: BaseException, where: str) -> BaseException:
    """The exception to raise in place of one of the library's, about the address shown as ``where``."""
    kind, status = type(error).__name__, status_of(error)
    if isinstance(error, FileNotFoundError) or status == HTTPStatus.NOT_FOUND:
        return FileNotFoundError(errno.ENOENT, "No such object on the server", where)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        how = f" (status {status})" if status else ""
        return PermissionError(errno.EACCES, f"The server wants other credentials{how}", where)
    if kind == "PreconditionError" or status == HTTPStatus.PRECONDITION_FAILED:
        return read_error(where, CHANGED)
    if isinstance(error, WeightLoadError):
        return error
    return read_error(where, reason_of(error))


def reason_of(error: BaseException) -> str:
    """The reason of an exception of the library's, in our words."""
    status = status_of(error)
    if status is not None:
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "unknown"
        return f"the server answered with status {status} ({phrase})"
    text = str(error).lower()
    if any(path in text for path in _METADATA):
        return "no credentials for it were found: none in the environment, and no cloud's machine answers for this one"
    text = _BESIDE.sub("", text)
    for words, reason in _SOURCES:
        if words in text:
            return reason
    if "content-length" in text or "content length" in text:
        return "the server does not say how long the object is"
    if "credential" in text:
        return "no credentials for it were found"
    return f"it cannot be read ({type(error).__name__})"
