"""Servers on loopback: one for HTTP that fails as it is told to, and one that speaks S3."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Answer = Callable[["Handler"], bool]


class Web(http.server.ThreadingHTTPServer):
    """Serves the files of a folder, by ranges, with tags.

    Attributes:
        asked: (method, path, range or None) of every request.
        headers: of every request.
        ranges: whether it knows ranges.
        tags: whether it gives tags.
        before: of each request, may answer in place of the server and return true.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[tuple[str, str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.ranges = self.tags = True
        self.before: Answer = lambda handler: False
        self.released = threading.Event()  # what hangs ends then

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    """One request after the other, of one connection."""

    server: Web
    protocol_version = "HTTP/1.1"
    extra: dict[str, str] = {}  # noqa: RUF012 - headers of the answer; a hook of ``before`` sets its own

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        self.server.headers.append(dict(self.headers))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if not self.server.before(self):
                self.serve()

    do_HEAD = do_GET

    def serve(self) -> None:
        """Answer a request for a file as a server should."""
        path = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            return self.reply(404)
        data = path.read_bytes()
        tag = {"ETag": f'"{abs(hash(data))}"'} if self.server.tags else {}
        wanted = self.headers.get("If-Match")
        if tag and wanted and wanted != tag["ETag"]:
            return self.reply(412)
        asked = self.headers.get("Range") if self.server.ranges else None
        if asked is None:
            return self.reply(200, data, tag)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        assert found, asked
        begin, end = int(found[1]), min(int(found[2]) + 1, len(data))
        if begin >= len(data):
            return self.reply(416, headers={"Content-Range": f"bytes */{len(data)}"})
        return self.reply(206, data[begin:end], tag | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})

    def reply(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        """``length``: what it says, if it lies."""
        self.send_response(status)
        for name, value in {**self.extra, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        if length is not None and length != len(body):
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Web]:
    server = Web(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # seconds, in which its end is noticed
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def hang(web: Web, path: str = "", first: int = 1) -> threading.Event:
    """From there on, bytes of what begins with this path never come. Set when they are asked for."""
    asked = threading.Event()

    def before(handler: Handler) -> bool:
        begin = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if not handler.path.startswith(f"/{path}") or begin < first:
            return False
        asked.set()
        web.released.wait()
        return True

    web.before = before
    return asked


def damage_once(web: Web, path: Path, at: int, times: int = 1) -> list[str]:
    """Answers with a wrong bit, which no tag shows; asked again, the server is right. Returns what was damaged."""
    data = path.read_bytes()
    damaged: list[str] = []

    def damage(handler: Handler) -> bool:
        begin, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        if handler.path != f"/{path.name}" or len(damaged) >= times or not begin <= at <= end < len(data):
            return False
        damaged.append(handler.path)
        body = bytearray(data[begin : end + 1])
        body[at - begin] ^= 1
        tag = {"ETag": f'"{abs(hash(data))}"', "Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        handler.reply(206, bytes(body), tag)
        return True

    web.before = damage
    return damaged


def all_told(error: BaseException) -> str:
    """All that a logger could find."""
    texts = []
    while error is not None:
        texts += [str(error), repr(error.args), str(getattr(error, "filename", ""))]
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "\n".join(texts)
