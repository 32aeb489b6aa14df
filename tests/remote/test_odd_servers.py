"""Servers, addresses and moments that are not as one would wish: no wrong byte, no secret told, no hang."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Handler, all_told, damage_once, serving

import weightload
from weightload._remote import in_order
from weightload._remote.source import open_addresses
from weightload._verify import tap
from weightload.errors import (
    CheckpointError,
    ChecksumError,
    DuplicateTensor,
    HeaderTooSmall,
    ReadError,
    WeightLoadError,
)

SECRET = "sig=SECRET"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "served" / "model.safetensors"
    path.parent.mkdir()
    bits = torch.Generator().manual_seed(21)
    save_file({name: torch.randn(1500, 1031, generator=bits) for name in "abcd"}, path)
    return path


def test_a_long_read_of_a_server_without_ranges(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_order, "MOST_KEPT", 1 << 20)
    want = load_file(model)
    with serving(model.parent) as web:
        web.ranges = False
        with weightload.safe_open(web.address(model.name), "pt") as handle:
            for name in ("b", "d", "a", "a", "c"):  # backwards, too
                assert torch.equal(handle.get_tensor(name), want[name])


def test_after_a_request_that_was_broken_off(model: Path) -> None:
    want = load_file(model)
    stalls = threading.Event()
    with serving(model.parent) as web:
        web.ranges = False

        def stall(handler: Handler) -> bool:
            data = model.read_bytes()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            half = (9 << 20) + 900_000
            handler.wfile.write(data[:half])
            handler.wfile.flush()
            if not stalls.is_set():
                stalls.set()
                web.released.wait(30)
            handler.wfile.write(data[half:])
            return True

        web.before = stall
        web.tags = False

        class Alarm(Exception):
            pass

        def ring(number: int, frame: FrameType | None) -> None:
            raise Alarm

        before = signal.signal(signal.SIGALRM, ring)
        try:
            with weightload.safe_open(web.address(model.name), "pt") as handle:
                signal.setitimer(signal.ITIMER_REAL, 1)
                with pytest.raises(Alarm):
                    handle.get_tensor("b")
                web.released.set()
                for name in "cbda":  # the next first: it goes on where the stream seems to be
                    assert torch.equal(handle.get_tensor(name), want[name])
        finally:
            signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", [TimeoutError, KeyError])
def test_what_a_signal_handler_raises_comes_out(model: Path, kind: type[Exception]) -> None:
    def ring(number: int, frame: FrameType | None) -> None:
        raise kind("my alarm")

    with serving(model.parent) as web:
        web.before = lambda handler: not handler.headers.get("Range", "").startswith("bytes=0-") and web.released.wait()
        before = signal.signal(signal.SIGALRM, ring)
        try:
            with weightload.safe_open(web.address(model.name), "pt") as handle:
                signal.setitimer(signal.ITIMER_REAL, 0.5)
                with pytest.raises(kind, match="my alarm"):
                    handle.get_tensor("c")
        finally:
            signal.signal(signal.SIGALRM, before)


def test_packed_later(model: Path) -> None:
    with serving(model.parent) as web:

        def pack(handler: Handler) -> bool:
            asked = handler.headers.get("Range", "")
            if asked.startswith("bytes=0-"):
                return False
            begin, end = map(int, asked.removeprefix("bytes=").split("-"))
            data = model.read_bytes()
            handler.reply(
                206, b"\x1f" * (end + 1 - begin),
                {"Content-Encoding": "gzip", "ETag": f'"{abs(hash(data))}"',
                 "Content-Range": f"bytes {begin}-{end}/{len(data)}"},
            )  # fmt: skip
            return True

        web.before = pack
        with pytest.raises(ReadError, match="gzip"):
            weightload.load_file(web.address(model.name))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 416])
def test_secrets_stay_out_of_all_that_is_raised(model: Path, status: int) -> None:
    with serving(model.parent) as web:
        web.before = lambda handler: handler.reply(status) is None
        address = f"http://user:PASSWORD@{web.url[7:]}/{model.name}?{SECRET}"
        for call in (
            weightload.load_file,
            weightload.resolve_safetensors_files,
            lambda a: weightload.safe_open(a, "pt"),
        ):
            if call is weightload.resolve_safetensors_files:
                address_of = address.replace(model.name, "folder")
            else:
                address_of = address
            with pytest.raises((OSError, WeightLoadError)) as raised:
                call(address_of)
            told = all_told(raised.value)
            assert "SECRET" not in told
            assert "PASSWORD" not in told


@pytest.mark.parametrize(
    "address",
    [
        "http://user:PASSWORD@ho\u2100st/x.safetensors",
        "http://user:PASSWORD@[bad/x.safetensors",
        "http://user:PASS/WORDPASSWORD@host.invalid/x.safetensors",
        "s3://AKIAKEY:PASSWORD@bucket/x.safetensors?X-Amz-Signature=PASSWORD",
    ],
)
def test_addresses_that_are_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises((OSError, ValueError, WeightLoadError)) as raised:
        weightload.load_file(address)
    assert "PASSWORD" not in all_told(raised.value)


def test_a_promise_that_is_not_kept(model: Path) -> None:
    save_file({"other": torch.ones(2)}, model.parent / "model-1.safetensors")
    index = {"a": "model.safetensors", "nowhere": "model-1.safetensors"}
    (model.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with serving(model.parent) as web, pytest.raises(CheckpointError, match="no shard has it") as raised:
        weightload.resolve_safetensors_files(f"http://user:PASSWORD@{web.url[7:]}/?{SECRET}")
    assert "SECRET" not in all_told(raised.value)
    assert "PASSWORD" not in all_told(raised.value)


@pytest.mark.parametrize("name", ["m#1.safetensors", "m%201.safetensors", "m?1.safetensors", "ä ö.safetensors"])
def test_names_with_signs_of_addresses(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with serving(tmp_path) as web:
        (address,) = weightload.resolve_safetensors_files(f"{web.url}/?{SECRET}")
        assert weightload.load_file(address)["a"].sum() == 3
        assert all(SECRET in path for _, path, _ in web.asked)


@pytest.mark.parametrize(
    "names",
    [
        ["%2e%2e/other.safetensors"], ["..\\other.safetensors"], ["..%2fother.safetensors"], ["\ud800.safetensors"],
        ["a/" * 1500 + "x.safetensors"], ["a/" * 3000 + "x.safetensors"], ["."], ["model.safetensors.index.json"],
        ["m.safetensors", "m.safetensors/x.safetensors"], ["/etc/x.safetensors"], ["\0.safetensors"],
    ],
)  # fmt: skip
def test_indexes_of_an_enemy(tmp_path: Path, names: list[str]) -> None:
    served = tmp_path / "served"
    served.mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    weight_map = {str(number): name for number, name in enumerate(names)}
    (served / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with serving(tmp_path) as web:
        with pytest.raises((OSError, WeightLoadError)) as raised:
            weightload.load_file(weightload.resolve_safetensors_files(f"{web.url}/served")[0])
        assert not isinstance(raised.value, (FileExistsError, IsADirectoryError))
        assert not any(path == "/other.safetensors" for _, path, _ in web.asked)


def test_an_index_decides_between_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.full((3,), 4.0)}, tmp_path / "two.safetensors")
    index = {"a": "two.safetensors", "b": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with serving(tmp_path) as web:
        files = weightload.resolve_safetensors_files(f"{web.url}/?{SECRET}")
        got = dict(weightload.safetensors_weights_iterator(files, to_cpu=True))
        assert got["a"].sum() == 12
        twice = [web.address("one.safetensors")] * 2
        with pytest.raises(DuplicateTensor, match="listed twice"):
            dict(weightload.safetensors_weights_iterator(twice, to_cpu=True))


def test_forbidden_may_mean_missing(model: Path) -> None:
    with serving(model.parent) as web:
        web.before = lambda handler: "index" in handler.path and handler.reply(403) is None
        assert weightload.resolve_safetensors_files(web.url) == [web.address(model.name)]
        web.before = lambda handler: handler.command == "HEAD" and handler.reply(405) is None
        assert weightload.resolve_safetensors_files(web.url) == [web.address(model.name)]


def test_a_stream_that_is_lost_while_nobody_reads(model: Path) -> None:
    want = load_file(model)
    with serving(model.parent) as web:
        web.ranges = False
        times: list[int] = []

        def drop(handler: Handler) -> bool:
            data = model.read_bytes()
            times.append(1)
            cut = len(data) // 2 if len(times) < 3 else len(data)
            handler.reply(200, data[:cut], length=len(data))
            return True

        web.before = drop
        with weightload.safe_open(web.address(model.name), "pt") as handle:
            assert torch.equal(handle.get_tensor("d"), want["d"])


def test_an_empty_object_whose_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with serving(tmp_path) as web:
        with pytest.raises(HeaderTooSmall):
            weightload.load_file(web.address("empty.safetensors"))
        web.before = lambda handler: handler.command == "HEAD" and handler.reply(403) is None
        with pytest.raises(PermissionError) as raised:
            weightload.load_file(f"{web.address('empty.safetensors')}?{SECRET}")
        assert "SECRET" not in all_told(raised.value)


def test_the_exit_while_a_daemon_thread_waits_for_a_server(model: Path) -> None:
    script = """
        import sys, threading, time, weightload
        handle = weightload.safe_open(sys.argv[1], "pt")
        began = threading.Event()

        def get():
            began.set()
            handle.get_tensor("a")

        threading.Thread(target=get, daemon=True).start()
        began.wait()
        time.sleep(float(sys.argv[2]))
    """
    with serving(model.parent) as web:
        web.before = lambda handler: not handler.headers.get("Range", "").startswith("bytes=0-") and web.released.wait()
        command = [sys.executable, "-c", textwrap.dedent(script), web.address(model.name)]
        children = [subprocess.Popen([*command, str(number / 20)]) for number in range(6)]
        children += [subprocess.Popen([*command, str(0.3 + number / 100)]) for number in range(6)]
        for child in children:
            assert child.wait(60) == 0


SLOWLY = """
    import asyncio.selector_events, atexit, os, signal, sys, threading, time, weightload
    Loop = asyncio.selector_events.BaseSelectorEventLoop
    wake = Loop._write_to_self

    def wake_slowly(loop):
        wake(loop)
        if isinstance(threading.current_thread(), threading._DummyThread):
            handing_over.set()
            time.sleep(0.4)  # as a thread that the machine has no time for

    Loop._write_to_self = wake_slowly
    handing_over = threading.Event()

    def load():
        print(*weightload.safe_open(sys.argv[1], "pt").keys(), flush=True)
"""
ENDS = {
    "at once": "load()",
    "first load in an exit handler": "atexit.register(load)",
    "Ctrl-C": """
        def interrupt():
            handing_over.wait()
            for _ in range(3):
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        load()
        """,
    "a handler that exits": """
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))
        load()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        """,
}


@pytest.mark.parametrize("end", ENDS)
def test_the_exit_while_the_library_hands_over_an_answer(model: Path, end: str) -> None:
    """Its threads run Python code to do so, and must not be in it when the interpreter ends: they would abort it."""
    script = textwrap.dedent(SLOWLY) + textwrap.dedent(ENDS[end])
    with serving(model.parent) as web:
        command = [sys.executable, "-c", script, web.address(model.name)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode in ({0, 1, 3, -signal.SIGINT} if "Ctrl-C" in end or "handler" in end else {0}), ended.stderr
    assert ended.stdout.split()[:1] == ["a"]
    if end in ("at once", "first load in an exit handler"):
        assert ended.stderr == ""


@pytest.mark.parametrize("load", ['weightload.safe_open(sys.argv[1], "pt")', "weightload.load_file(sys.argv[1])"])
def test_a_signal_handler_loads_while_it_stops_a_load(model: Path, load: str) -> None:
    """Whatever the load was at: it does not wait for what the handler has stopped, nor do its threads."""
    script = """
        import signal, sys, weightload
        from weightload._remote import direct
        direct.serves = lambda address: False  # so that its threads wait for the library's answers
        busy, loads = False, 0

        def handler(*_):
            global busy, loads
            if not busy:
                busy = True
                LOAD
                busy, loads = False, loads + 1

        weightload.load_file(sys.argv[1])
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.0031)
        while loads < 150:
            weightload.safe_open(sys.argv[1], "pt")
        signal.setitimer(signal.ITIMER_REAL, 0)
    """
    with serving(model.parent) as web:
        command = [sys.executable, "-c", textwrap.dedent(script).replace("LOAD", load), web.address(model.name)]
        assert subprocess.run(command, check=False, timeout=120).returncode == 0


def test_a_signal_handler_loads_while_it_stops_a_checked_load_that_makes_a_copy(model: Path, tmp_path: Path) -> None:
    """Its locks are wanted by the thread that brings the handler what it loads."""
    script = """
        import signal, sys, weightload
        busy, loads = False, 0

        def handler(*_):
            global busy, loads
            if not busy:
                busy = True
                weightload.safe_open(sys.argv[1], "pt")
                busy, loads = False, loads + 1

        def load():
            verify, cache = {"model.safetensors": sys.argv[2]}, f"{sys.argv[3]}/{done}"
            return weightload.safetensors_weights_iterator(sys.argv[1:2], to_cpu=True, verify=verify, cache=cache)

        done = 0
        dict(load())
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.0031)
        while loads < 60 or done < 3:
            done += 1
            assert len(dict(load())) == 4
        signal.setitimer(signal.ITIMER_REAL, 0)
    """
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    with serving(model.parent) as web:
        command = [sys.executable, "-c", textwrap.dedent(script), web.address(model.name), digest, str(tmp_path)]
        assert subprocess.run(command, check=False, timeout=120).returncode == 0


def test_a_load_goes_on_while_another_ones_lock_is_held(model: Path) -> None:
    """By a thread whose signal handler loads, say."""

    class Tap:
        def __init__(self) -> None:
            self.lock = threading.Condition()
            self.given = threading.Event()

        def give(self, begin: int, data: object) -> None:
            self.given.set()

    with serving(model.parent) as web:
        files = open_addresses([web.address(model.name)])
        source = files[0].remote
        source.start, source.tap = source.start[:0], Tap()  # so that it has to ask
        with source.tap.lock:
            answer = source.ask(0, 1000)
            assert len(dict(weightload.safetensors_weights_iterator([web.address(model.name)], to_cpu=True))) > 1
            assert not source.tap.given.is_set()
            assert not answer.wait(0)
        while not answer.wait(10):
            pass
        assert source.tap.given.is_set()
        assert bytes(answer.bytes()) == model.read_bytes()[:1000]


@pytest.mark.parametrize("room", [512 << 20, 0])
@pytest.mark.parametrize("names", [None, {"c"}])
def test_a_verdict_is_on_the_bytes_that_were_loaded(
    model: Path, names: set[str] | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer is damaged on the way, as no tag shows; asked again, the server is right."""
    monkeypatch.setattr(tap.Budget, "MOST", room)
    data = model.read_bytes()
    right = hashlib.sha256(data).hexdigest()
    with serving(model.parent) as web:
        for broken in (False, True):
            damaged = damage_once(web, model, len(data) // 2 + 1000) if broken else []  # in c
            weights = weightload.safetensors_weights_iterator(
                [web.address(model.name)], to_cpu=True, names=names, verify={model.name: right}
            )
            if broken:
                with pytest.raises(ChecksumError):
                    dict(weights)
                assert damaged
            else:
                dict(weights)


@pytest.mark.parametrize(
    "address",
    ["ftp://u:PASSWORD@host/x.safetensors", "hf://u:PASSWORD@x/y?sig=PASSWORD", Path("http://u:PASSWORD@h/x")],
)
def test_what_is_no_address(address: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (weightload.load_file, weightload.resolve_safetensors_files):
        with pytest.raises((OSError, ValueError, WeightLoadError)) as raised:
            call(address)
        assert "PASSWORD" not in all_told(raised.value)
