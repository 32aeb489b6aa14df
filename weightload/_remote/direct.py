"""Ranges by plain HTTP, whose bytes the core's threads take from the socket, straight to where they belong.

The library copies a body twice before we have it, into memory that is new each time: on a fast network that is most of
a load. So where a connection has nothing between the socket and the bytes (no TLS, no proxy), the standard library's
``http.client`` makes the request and reads the answer's head, and the core receives the body.

Nothing is decided here. An answer that is not exactly the one that was wanted, in time and to its last byte, is
dropped, and the library is asked for that range: it knows what can be tried again, and what an error is.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import re
import socket
import urllib.request
import weakref
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from weightload._base.handlers import forgiven, pass_on
from weightload._base.uncopied import Process
from weightload._remote.answers import Tap
from weightload._version import __version__

SECONDS_TO_CONNECT = 1.0
SECONDS_FOR_HEAD = 1.0  # from its first byte on
MOST_FAILURES = 3  # in a row; then it is left to the library for good
MOST_IDLE = 32  # connections
AGENT = f"weightload/{__version__}"

# What every client writes in the same way. Of other addresses the library makes what it takes for right.
_SAME_FOR_ALL = re.compile(r"/[A-Za-z0-9\-._~!$&()*+,;=:@/%]*(\?[A-Za-z0-9\-._~!$&()*+,;=:@/%?]*)?", re.ASCII)
_DOTS = re.compile(r"/(\.|%2e){1,2}(/|\?|$)", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9\-.]+|[0-9A-Fa-f:.]+", re.ASCII)


class Connections:
    """Those to one server that wait for their next request."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[http.client.HTTPConnection] = []
        self._process = Process()

    def take(self) -> tuple[http.client.HTTPConnection, bool]:
        """One, and whether it is new.

        Raises:
            OSError: none can be made.
        """
        while self._idle:
            kept = self._idle.pop()
            if _is_quiet(kept.sock):
                return kept, False
            kept.close()
        made = http.client.HTTPConnection(self._host, self._port, timeout=SECONDS_TO_CONNECT)
        try:
            made.connect()
        except BaseException:
            made.close()
            raise
        return made, True

    def give_back(self, connection: http.client.HTTPConnection) -> None:
        if len(self._idle) < MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def __del__(self) -> None:
        self.close()

    def is_usable(self) -> bool:
        """Not in a forked child: it would write into the parent's connections."""
        return not self._process.is_parent()


def _is_quiet(connected: socket.socket) -> bool:
    """Whether a connection is open, and nothing has come that nobody asked for."""
    try:
        connected.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError as ended:
        pass_on(ended)
    return False


_connections: weakref.WeakValueDictionary[tuple[str, int], Connections] = weakref.WeakValueDictionary()


class Request:
    """One that was sent. For the core's threads, see csrc/bindings/remote_source.h."""

    def __init__(self, direct: Direct, connection: http.client.HTTPConnection, is_new: bool, begin: int, end: int):
        self._direct, self._connection, self._is_new = direct, connection, is_new
        self._begin, self._end = begin, end
        self.tap: Tap | None = None
        self._socket = connection.sock  # which the connection forgets where the answer ends it
        self._response: http.client.HTTPResponse | None = None
        self.patience = direct.patience

    def fileno(self) -> int:
        return self._socket.fileno()

    def head(self) -> bytes | None:
        """What has come of the body, if the head is as it should be; its first byte has come."""
        try:
            self._socket.settimeout(SECONDS_FOR_HEAD)
            self._response = response = self._connection.getresponse()
            if not self._direct.is_wanted(response, self._begin, self._end):
                return None
            self._socket.settimeout(0.0)  # from now on the core waits
            return response.fp.read1(len(response.fp.peek()))
        except (OSError, http.client.HTTPException, ValueError) as failed:
            pass_on(failed)
            return None

    def done(self, body: memoryview) -> None:
        """The body was taken to its end, and is there for as long as this runs. Raises what the tap raises."""
        response = self._response
        assert response is not None
        ends = response.will_close
        response.close()
        self._direct.failures = 0
        if ends:
            self._connection.close()
        else:
            self._direct.connections.give_back(self._connection)
        with body:
            if self.tap is not None:
                self.tap.give(self._begin, body)

    def drop(self) -> None:
        # A server may close a connection that has been idle at any moment.
        self._direct.failures += 1 if self._is_new or self._response is not None else 0
        if self._response is not None:
            self._response.close()
        self._connection.close()


class Direct:
    """An object of a server's.

    Args:
        address: begins with ``http://``; a signed one, where the server wants that.
        headers: that go along with each request.
        meta: the library's, of the answer when the object was opened.
        patience: seconds in which something of an answer must come.
    """

    def __init__(self, address: str, headers: Mapping[str, str], meta: Any, patience: float) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None
        self._target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        self._headers = headers
        self._size, self._tag, self._modified = meta["size"], meta["e_tag"], meta["last_modified"]
        self.patience = patience
        self.failures = 0
        at = parts.hostname, parts.port or 80
        self.connections = _connections.get(at) or _connections.setdefault(at, Connections(*at))

    @staticmethod
    def serves(address: str) -> bool:
        """Whether requests to it go so: plain HTTP, not by a proxy, and written as everybody would."""
        parts = urlsplit(address)
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        return (
            parts.scheme == "http"
            and parts.hostname is not None
            and _HOST.fullmatch(parts.hostname) is not None
            and _SAME_FOR_ALL.fullmatch(target) is not None
            and _DOTS.search(target) is None
            and not any(kind in urllib.request.getproxies() for kind in ("http", "all"))
        )

    def begin(self, begin: int, end: int, tap: Tap | None) -> Request | None:
        """Ask for a range, which a tap is told of; None where the library should."""
        if self.failures >= MOST_FAILURES or not self.connections.is_usable():
            return None
        headers = {**self._headers, "Range": f"bytes={begin}-{end - 1}", "User-Agent": AGENT}
        if self._tag and not self._tag.startswith("W/"):
            headers["If-Match"] = self._tag
        for _ in range(2):
            connection, is_new = None, True
            try:
                connection, is_new = self.connections.take()
                connection.sock.settimeout(SECONDS_TO_CONNECT)
                connection.putrequest("GET", self._target, skip_accept_encoding=True)
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders()
                request = Request(self, connection, is_new, begin, end)
                request.tap = tap
                return request
            except BaseException as failed:
                if connection is not None:
                    connection.close()
                if not isinstance(failed, (OSError, http.client.HTTPException, ValueError)):
                    raise
                pass_on(failed)
                if is_new:
                    break
        self.failures += 1
        return None

    def is_wanted(self, response: http.client.HTTPResponse, begin: int, end: int) -> bool:
        """Whether the body will be these bytes of the object as it was opened, and nothing else."""
        return (
            response.status == HTTPStatus.PARTIAL_CONTENT
            and response.length == end - begin
            and response.getheader("Transfer-Encoding") is None
            and response.getheader("Content-Encoding") in (None, "identity")
            and response.getheader("Content-Range") == f"bytes {begin}-{end - 1}/{self._size}"
            and response.getheader("ETag") == self._tag
            and _time(response.getheader("Last-Modified")) == self._modified
        )


_UNKNOWN = datetime.datetime.fromtimestamp(0, datetime.timezone.utc)  # as the library has it


def _time(header: str | None) -> datetime.datetime | None:
    with forgiven(ValueError, TypeError):
        return _UNKNOWN if header is None else email.utils.parsedate_to_datetime(header)
    return None


__all__ = ["Direct", "Request"]
