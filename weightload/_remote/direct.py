"""Ranges by plain HTTP, whose bytes the core's threads take from the socket, straight to where they belong.

The library copies a body twice before we have it, into memory that is new each time: on a fast network that is most of
a load. So where a connection has nothing between the socket and the bytes (no TLS, no proxy), the core connects, sends
the request that is written here, and receives; the head of an answer is read by the standard library's ``http.client``.

Nothing is decided here. An answer that is not exactly the one that was wanted, in time and to its last byte, is
dropped, and the library is asked for that range: it knows what can be tried again, and what an error is.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import io
import ipaddress
import re
import socket
import threading
import time
import urllib.request
import weakref
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from weightload import _C
from weightload._base.handlers import forgiven, pass_on
from weightload._base.uncopied import Process
from weightload._remote.answers import Tap
from weightload._version import __version__

MOST_FAILURES = 3  # in a row; then it is left to the library for good
MOST_IDLE = 64  # connections
SECONDS_IDLE = 30.0  # what lies between may have forgotten an older connection without a word
AGENT = f"weightload/{__version__}"

# Paths that every client writes in the same way. The library turns others into what it takes for right.
_SAME_FOR_ALL = re.compile(r"/[A-Za-z0-9\-._~!$&()*+,;=:@/%]*(\?[A-Za-z0-9\-._~!$&()*+,;=:@/%?]*)?", re.ASCII)
_DOTS = re.compile(r"/(\.|%2e){1,2}(/|\?|$)", re.IGNORECASE)
_NAME = re.compile(r"[a-z0-9\-.]+", re.ASCII)
_LIKE_A_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)\.?", re.ASCII)  # the last label of one: 127.1 is an address, too


class Server(NamedTuple):
    """Whom a connection is made to."""

    host: str
    port: int


class Connections:
    """Those to one server that wait for their next request.

    Attributes:
        failures: answers in a row that were not as they should be.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._addresses: list[str] = []  # none until they are known
        self._at = 0  # the one that is connected to
        self._idle: list[tuple[float, _C.Connection]] = []
        self._process = Process()
        self.failures = 0
        with forgiven(ValueError):  # it is a name
            ipaddress.ip_address(server.host)
            self._addresses = [server.host]
        if not self._addresses:
            with forgiven(RuntimeError):  # there is no thread left
                threading.Thread(target=self._resolve, name="weightload-resolve", daemon=True).start()

    def _resolve(self) -> None:
        """Ask for the server's addresses, for as long as that takes: neither an opening nor the exit waits for it."""
        with forgiven(OSError, UnicodeError):
            found = socket.getaddrinfo(self._server.host, self._server.port, type=socket.SOCK_STREAM)
            self._addresses = [str(where[0]) for *_, where in found]

    def take(self) -> _C.Connection:
        """One that is open, or that begins to be."""
        while True:
            try:
                since, kept = self._idle.pop()  # by any thread, and a signal's handler
            except IndexError as none_left:
                pass_on(none_left)
                return _C.Connection(self._addresses[self._at % len(self._addresses)], self._server.port)
            if time.monotonic() - since < SECONDS_IDLE and kept.is_quiet():
                return kept

    def give_back(self, connection: _C.Connection) -> None:
        if len(self._idle) < MOST_IDLE:
            self._idle.append((time.monotonic(), connection))

    def failed(self) -> None:
        """So will others that were kept, perhaps, and new ones to the same address."""
        self.failures += 1
        self._at += 1
        self._idle.clear()

    def is_usable(self) -> bool:
        """Whether an address is known and few failed. A forked child must not write into the parent's connections."""
        return bool(self._addresses) and self.failures < MOST_FAILURES and not self._process.is_parent()


# A WeakValueDictionary will not do: its callbacks are Python code, and what a signal's handler raises there is lost.
_connections: dict[Server, weakref.ref[Connections]] = {}


def _connections_to(server: Server) -> Connections:
    """Those that there are, or new ones."""
    known = _connections.get(server)
    found = known() if known is not None else None
    if found is None:
        found = Connections(server)
        _connections[server] = weakref.ref(found)
    return found


class _Head:
    """Stands for the socket that ``http.client`` reads an answer's head from."""

    def __init__(self, head: bytes) -> None:
        self._head = head

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._head)


class Request:
    """One that is to be sent. For the core's threads, see csrc/bindings/remote_source.h."""

    def __init__(self, direct: Direct, begin: int, end: int, tap: Tap | None) -> None:
        self._direct, self._begin, self._end, self._tap = direct, begin, end, tap
        self._ends_connection = False
        self.connection = direct.connections.take()
        self.text = direct.text_of(begin, end)
        self.patience = direct.patience

    def is_wanted(self, head: bytes) -> bool:
        """Whether the body will be these bytes of the object as it was opened, and nothing else."""
        try:
            answer = http.client.HTTPResponse(_Head(head))  # type: ignore[arg-type]
            answer.begin()
            self._ends_connection = answer.will_close
            if answer.fp.read(1):  # it takes the head to end sooner
                return False
            return self._direct.is_wanted(answer, self._begin, self._end)
        except Exception as failed:
            pass_on(failed)
            return False

    def done(self, body: memoryview) -> None:
        """The body was taken to its end, and is there for as long as this runs. Raises what the tap raises."""
        self._direct.connections.failures = 0
        if not self._ends_connection:
            self._direct.connections.give_back(self.connection)
        with body:
            if self._tap is not None:
                self._tap.give(self._begin, body)

    def failed(self) -> None:
        """The connection is of no more use, and the library is asked."""
        self._direct.connections.failed()


class Direct:
    """An object of a server's.

    Args:
        address: one that ``serves`` takes; a signed one, where the server wants that.
        headers: that go along with each request.
        same: the ``identity`` of the object when it was opened.
        patience: seconds in which something of an answer must come.
    """

    def __init__(
        self, connections: Connections, address: str, headers: Mapping[str, str], same: tuple[Any, ...], patience: float
    ) -> None:
        self.connections, self.patience = connections, patience
        self._size, self._tag, self._modified = same
        all_headers = {"Host": urlsplit(address).netloc.rpartition("@")[2], **headers, "User-Agent": AGENT}
        if self._tag and not self._tag.startswith("W/"):
            all_headers["If-Match"] = self._tag
        lines = [f"GET {_target(address)} HTTP/1.1", *(f"{name}: {value}" for name, value in all_headers.items())]
        self._text = "\r\n".join(lines).encode("latin-1")
        if self._text.count(b"\n") != len(lines) - 1 or self._text.count(b"\r") != len(lines) - 1:
            raise ValueError("a header of more than one line")

    @classmethod
    def of(cls, address: str, headers: Mapping[str, str], same: tuple[Any, ...], patience: float) -> Direct | None:
        """None where the library should make all requests."""
        if not serves(address):
            return None
        try:
            return cls(_connections_to(_server(address)), address, headers, same, patience)
        except ValueError as failed:
            pass_on(failed)
            return None

    def begin(self, begin: int, end: int, tap: Tap | None) -> Request | None:
        """Ask for a range, which a tap is told of; None where the library should."""
        return Request(self, begin, end, tap) if self.connections.is_usable() else None

    def text_of(self, begin: int, end: int) -> bytes:
        """The request."""
        return b"%s\r\nRange: bytes=%d-%d\r\n\r\n" % (self._text, begin, end - 1)

    def is_wanted(self, answer: http.client.HTTPResponse, begin: int, end: int) -> bool:
        """See ``Request.is_wanted``."""
        return (
            answer.status == HTTPStatus.PARTIAL_CONTENT
            and answer.length == end - begin
            and answer.getheader("Transfer-Encoding") is None
            and answer.getheader("Content-Encoding") in (None, "identity")
            and answer.getheader("Content-Range") == f"bytes {begin}-{end - 1}/{self._size}"
            and answer.getheader("ETag") == self._tag
            and _time(answer.getheader("Last-Modified")) == self._modified
        )


def serves(address: str) -> bool:
    """Whether requests to it can go so: plain HTTP, not by a proxy, and written as everybody would."""
    parts = urlsplit(address)
    target = _target(address)
    return (
        parts.scheme == "http"
        and _is_common(parts.hostname or "")
        and _SAME_FOR_ALL.fullmatch(target) is not None
        and _DOTS.search(target) is None
        and not any(kind in urllib.request.getproxies() for kind in ("http", "all"))
    )


def _is_common(host: str) -> bool:
    if "%" in host:  # a scope
        return False
    with forgiven(ValueError):
        ipaddress.ip_address(host)
        return True
    last = host.rstrip(".").rpartition(".")[2]
    return _NAME.fullmatch(host) is not None and _LIKE_A_NUMBER.fullmatch(last) is None


def _server(address: str) -> Server:
    parts = urlsplit(address)
    assert parts.hostname is not None
    return Server(parts.hostname, parts.port or 80)


def _target(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"


_UNKNOWN = datetime.datetime.fromtimestamp(0, datetime.timezone.utc)  # as the library has it


def _time(header: str | None) -> datetime.datetime | None:
    with forgiven(ValueError, TypeError, OverflowError):
        return _UNKNOWN if header is None else email.utils.parsedate_to_datetime(header)
    return None


__all__ = ["Direct", "Request", "serves"]
