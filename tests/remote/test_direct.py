"""Ranges by plain HTTP, whose bytes go from the socket straight to where they belong; what is odd is the library's."""

from __future__ import annotations

import gc
import itertools
import os
import socket
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Handler, Web, environment, serving

import weightload
from weightload import settings
from weightload._remote import stores
from weightload._remote.direct import AGENT, MOST_FAILURES, Connections, _connections, serves
from weightload.errors import ReadError

SMALL = {"task_bytes": 1 << 20, "block_bytes": 1 << 20, "window_bytes": 4 << 20, "requests": 4}
NAME = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "served" / NAME
    path.parent.mkdir()
    bits = torch.Generator().manual_seed(31)
    save_file({f"{i:02}": torch.randn(512, 512, generator=bits) for i in range(12)}, path)
    return path


def load(web: Web) -> dict[str, torch.Tensor]:
    with settings.override(**SMALL):
        return dict(weightload.safetensors_weights_iterator([web.address(NAME)], to_cpu=True))


def require_same(got: dict[str, torch.Tensor], path: Path) -> None:
    want = load_file(path)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def is_direct(handler: Handler) -> bool:
    return handler.headers.get("User-Agent") == AGENT


def agents(web: Web) -> list[bool]:
    """Tell of each request but the one that opens whether it was a direct one."""
    return [headers.get("User-Agent") == AGENT for headers in web.headers[1:]]


def test_all_but_the_opening_is_direct(model: Path) -> None:
    callers = set()
    with serving(model.parent) as web:
        web.before = lambda handler: callers.add((is_direct(handler), handler.client_address)) or False  # type: ignore[func-returns-value]
        require_same(load(web), model)
        assert len(agents(web)) > 8
        assert all(agents(web))
        asked = sorted(
            tuple(map(int, found.removeprefix("bytes=").split("-"))) for _, _, found in web.asked[1:] if found
        )
        assert all(end + 1 == begin for (_, end), (begin, _) in itertools.pairwise(asked))  # each byte once
    assert len([one for one, _ in callers if one]) <= SMALL["requests"]  # connections are kept


def test_all_ways_to_load(model: Path) -> None:
    want = load_file(model)
    with serving(model.parent) as web:
        require_same(weightload.load_file(web.address(NAME)), model)
        into = {name: torch.empty_like(tensor) for name, tensor in want.items()}
        weightload.load_into(into, [web.address(NAME)])
        require_same(into, model)
        with weightload.safe_open(web.address(NAME), "pt") as handle:
            assert torch.equal(handle.get_slice("05")[100:200, 7:9], want["05"][100:200, 7:9])
        assert any(agents(web))


def tell(handler: Handler, headers: dict[str, str] | None = None, status: int = 206, shift: int = 0) -> bool:
    """An answer that is right but for these."""
    data = (handler.server.folder / NAME).read_bytes()
    begin, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    right = {"Content-Range": f"bytes {begin}-{end}/{len(data)}", "ETag": f'"{abs(hash(data))}"'}
    handler.reply(status, data[begin + shift : end + 1 + shift], {**right, **(headers or {})})
    return True


def begin_answer(handler: Handler, count: int) -> None:
    """Send the right head, and ``count`` bytes of the body."""
    data = (handler.server.folder / NAME).read_bytes()
    begin, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
    handler.send_header("ETag", f'"{abs(hash(data))}"')
    handler.send_header("Content-Length", str(end + 1 - begin))
    handler.end_headers()
    handler.wfile.write(data[begin : begin + count])
    handler.wfile.flush()


def cut_off(handler: Handler) -> bool:
    data = (handler.server.folder / NAME).read_bytes()
    begin, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    right = {"Content-Range": f"bytes {begin}-{end}/{len(data)}", "ETag": f'"{abs(hash(data))}"'}
    handler.reply(206, data[begin : (begin + end) // 2], right, length=end + 1 - begin)
    return True


def hang_up(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def speak_nonsense(handler: Handler) -> bool:
    handler.wfile.write(b"\0\xff" * 4096)
    return hang_up(handler)


def put_off(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 5)
    return hang_up(handler)


def end_lines_alone(handler: Handler) -> bool:
    """By line feeds; and the body could end the head once more."""
    data = (handler.server.folder / NAME).read_bytes()
    begin, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    lines = [
        "HTTP/1.1 206 Partial Content",
        f"Content-Range: bytes {begin}-{end}/{len(data)}",
        f'ETag: "{abs(hash(data))}"',
        f"Content-Length: {end + 1 - begin}",
    ]
    handler.wfile.write("\n".join([*lines, "", ""]).encode() + b"\r\n\r\n" + data[begin : end + 1])
    return hang_up(handler)


ODD: dict[str, Callable[[Handler], bool]] = {
    "another tag": lambda handler: tell(handler, {"ETag": '"another"'}, shift=4),
    "another time": lambda handler: tell(handler, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, shift=4),
    "a time that is none": lambda handler: tell(handler, {"Last-Modified": "yesterday"}, shift=4),
    "another range": lambda handler: tell(handler, {"Content-Range": "bytes 0-9/10"}, shift=4),
    "another size": lambda handler: tell(handler, {"Content-Range": "bytes 0-9/*"}, shift=4),
    "packed": lambda handler: tell(handler, {"Content-Encoding": "gzip"}, shift=4),
    "the whole": lambda handler: tell(handler, status=200, shift=4),
    "503": lambda handler: tell(handler, status=503, shift=4),
    "sent on": lambda handler: tell(handler, {"Location": "/elsewhere"}, status=302, shift=4),
    "no range": lambda handler: tell(handler, status=416),
    "cut off": cut_off,
    "hung up": hang_up,
    "nonsense": speak_nonsense,
    "put off": put_off,
    "line feeds alone": end_lines_alone,
    "a time out of all bounds": lambda handler: tell(
        handler, {"Last-Modified": "Wed, 21 Oct 99999999999999999 07:28:00 GMT"}, shift=4
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_answer_is_not_taken(model: Path, odd: str) -> None:
    """The library is asked, which gets the right one; and after a few of them no more direct requests are made."""
    with serving(model.parent) as web:
        web.before = lambda handler: is_direct(handler) and ODD[odd](handler)
        require_same(load(web), model)
        made = sum(agents(web))
        assert MOST_FAILURES <= made < MOST_FAILURES + SMALL["requests"]


def test_a_few_odd_answers_do_not_end_it(model: Path) -> None:
    taken: list[int] = []

    def sometimes(handler: Handler) -> bool:
        taken.append(1)
        return is_direct(handler) and len(taken) % 6 == 0 and hang_up(handler)

    with serving(model.parent) as web:
        web.before = sometimes
        for _ in range(5):
            require_same(load(web), model)
        assert sum(agents(web)) > 3 * len(web.asked) // 5


def test_an_answer_that_stands_still(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its head, or in its body: the library is asked after that long."""
    monkeypatch.setitem(stores.CLIENT, "read_timeout", "1s")
    stood: list[str] = []

    def stand_still(handler: Handler) -> bool:
        if not is_direct(handler) or len(stood) == 2:
            return False
        stood.append(handler.path)
        if len(stood) == 1:
            handler.wfile.write(b"HTTP/1.1 206 Par")
        else:
            begin_answer(handler, 70_000)
        handler.wfile.flush()
        handler.server.released.wait()
        return hang_up(handler)

    with serving(model.parent) as web:
        web.before = stand_still
        require_same(load(web), model)
        assert len(stood) == 2


@pytest.mark.parametrize("part", ["head", "a head that drips", "body"])
def test_a_load_is_left_while_an_answer_stands_still(model: Path, part: str) -> None:
    """At once: what the server would wait for is that it was left."""
    reached = threading.Event()

    def stand_still(handler: Handler) -> bool:
        if not is_direct(handler):
            return False
        if part == "body":
            begin_answer(handler, 1000)
        reached.set()
        while not handler.server.released.wait(0.05):
            if "drips" in part:
                handler.wfile.write(b"H")
        return hang_up(handler)

    with serving(model.parent) as web, settings.override(**SMALL):
        web.before = stand_still
        weights = weightload.safetensors_weights_iterator([web.address(NAME)], to_cpu=True)
        assert reached.wait(60)
        weights.close()
        assert not web.released.is_set()


def test_connections_that_were_closed_meanwhile(model: Path) -> None:
    handlers: list[Handler] = []
    with serving(model.parent) as web, settings.override(**SMALL):
        web.before = lambda handler: handlers.append(handler) or False  # type: ignore[func-returns-value]
        with weightload.safe_open(web.address(NAME), "pt") as handle:
            want = load_file(model)
            assert torch.equal(handle.get_tensor("03"), want["03"])
            for handler in handlers:
                handler.connection.shutdown(2)
            assert torch.equal(handle.get_tensor("08"), want["08"])
        assert all(agents(web))


def test_an_object_that_changes(model: Path) -> None:
    with serving(model.parent) as web, settings.override(**SMALL):
        with weightload.safe_open(web.address(NAME), "pt") as handle:
            handle.get_tensor("03")
            save_file({name: tensor + 1 for name, tensor in load_file(model).items()}, model)
            with pytest.raises(ReadError, match="changed while it was read"):
                handle.get_tensor("08")


def test_who_is_served() -> None:
    assert serves("http://host/a/b.safetensors?sig=x%2By&n=1")
    assert serves("http://[::1]:8080/a")
    for other in ("https://host/a", "http://host/a b", "http://host/a/../b", "http://host/%2E%2e/b", "http://hôst/a"):
        assert not serves(other)
    for host in ("127.1", "2130706433", "0x7f000001", "1.2.3.4.5", "017700000001", "a.0x1.", "[::1%25lo]"):
        assert not serves(f"http://{host}/a")
    for proxy in ("http_proxy", "ALL_PROXY"):
        with environment(**{proxy: "http://127.0.0.1:1"}):
            assert not serves("http://host/a")


def test_a_server_of_the_oldest_kind(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which closes each connection behind its answer."""
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.0")
    with serving(model.parent) as web:
        require_same(load(web), model)
        assert all(agents(web))


def test_what_goes_along(model: Path) -> None:
    with serving(model.parent) as web:
        host = web.url.removeprefix("http://")
        with settings.override(**SMALL):
            weights = weightload.safetensors_weights_iterator([f"http://me:pass@{host}/{NAME}"], to_cpu=True)
            require_same(dict(weights), model)
        assert all(agents(web))
        assert {headers.get("authorization") for headers in web.headers} == {"Basic bWU6cGFzcw=="}
        assert {headers["Host"] for headers in web.headers[1:]} == {host}
        tags = {headers.get("If-Match") for headers in web.headers[1:]}
    assert len(tags) == 1
    assert None not in tags


def test_a_forked_child_is_told(model: Path) -> None:
    """It does not write into its parent's connections."""
    script = """
        import os, sys, weightload
        handle = weightload.safe_open(sys.argv[1], "pt")
        handle.get_tensor("03")
        child = os.fork()
        if child == 0:
            try:
                handle.get_tensor("08")
            except weightload.errors.WeightLoadError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        handle.get_tensor("09")
    """
    with serving(model.parent) as web:
        command = [sys.executable, "-c", textwrap.dedent(script), web.address(NAME)]
        assert subprocess.run(command, check=False, timeout=120, env=os.environ).returncode == 0
        assert len(web.asked) == 3


def test_one_kept_connection_that_stands_still_ends_the_others(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one kept connection stands still, all end. The network may have lost all, and each would be waited for."""
    monkeypatch.setitem(stores.CLIENT, "read_timeout", "1s")
    known: set[object] = set()
    dead: list[object] = []
    is_over = threading.Event()

    def forget(handler: Handler) -> bool:
        if not is_direct(handler):
            return False
        if not is_over.is_set():
            known.add(handler.client_address)
        elif handler.client_address in known:
            dead.append(handler.client_address)
            handler.server.released.wait()
            return hang_up(handler)
        return False

    with serving(model.parent) as web, settings.override(**SMALL):
        web.before = forget
        handle = weightload.safe_open(web.address(NAME), "pt")
        require_same(load(web), model)
        assert len(known) > 1
        is_over.set()
        for name, tensor in load_file(model).items():
            assert torch.equal(handle.get_tensor(name), tensor)
        assert len(dead) == 1
        assert agents(web)[-1]


@pytest.mark.parametrize("step", ["take", "give_back", "failed"])
def test_what_a_signal_handler_raises_comes_out(model: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with serving(model.parent) as web:
        if step == "failed":
            web.before = lambda handler: is_direct(handler) and hang_up(handler)
        with weightload.safe_open(web.address(NAME), "pt") as handle:
            monkeypatch.setattr(Connections, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                handle.get_tensor("05")


def test_connections_go_with_who_uses_them(model: Path) -> None:
    with serving(model.parent) as web:
        with weightload.safe_open(web.address(NAME), "pt") as handle:
            handle.get_tensor("05")
            (connections,) = [known() for server, known in _connections.items() if f":{server.port}" in web.url]
            assert connections is not None
            known = weakref.ref(connections)
        del handle, connections
        gc.collect()
        assert known() is None


def test_a_server_by_its_name(model: Path) -> None:
    """Until its addresses are known, requests are the library's."""
    with serving(model.parent) as web:
        address = web.address(NAME).replace("127.0.0.1", "localhost")
        for _ in range(100):
            with settings.override(**SMALL), weightload.safe_open(address, "pt") as handle:
                for name, tensor in load_file(model).items():
                    assert torch.equal(handle.get_tensor(name), tensor)
            if any(agents(web)):
                break
        assert any(agents(web))
        hosts = {value for headers in web.headers for name, value in headers.items() if name.lower() == "host"}
        assert hosts == {f"localhost:{web.server_port}"}


def test_a_name_that_nobody_answers_for_holds_nothing_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, released = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def slow(*arguments: object, **named: object) -> object:
        if threading.current_thread().name == "weightload-resolve":
            asked.set()
            released.wait()
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with serving(model.parent) as web:
        address = web.address(NAME).replace("127.0.0.1", "localhost")
        require_same(weightload.load_file(address), model)
        assert asked.wait(60)
        assert not any(agents(web))
        released.set()
