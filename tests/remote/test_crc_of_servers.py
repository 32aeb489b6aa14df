"""CRCs of what servers have, made of those of the answers: nothing is kept, and nothing asked for twice."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Web, damage_once, serving

import weightload
from weightload import settings
from weightload._remote import direct
from weightload._remote.direct import AGENT
from weightload._verify.crc_tap import CrcReading, CrcTap, Piece, crc_of
from weightload._verify.hashes import Crc
from weightload.errors import ChecksumError, ReadError

SMALL = {"task_bytes": 1 << 20, "block_bytes": 1 << 20, "window_bytes": 4 << 20, "requests": 4}
NAME = "model.safetensors"
KINDS = ["crc32c", "crc64nvme"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "served" / NAME
    path.parent.mkdir()
    bits = torch.Generator().manual_seed(41)
    save_file({f"{i:02}": torch.randn(512, 512, generator=bits) for i in range(8)}, path)
    return path


@pytest.fixture(params=["direct", "by the library"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "direct":
        monkeypatch.setattr(direct, "serves", lambda address: False)
    return str(request.param)


def right(path: Path, kind: str) -> dict[str, str]:
    return {NAME: f"{kind}:{crc_of(kind, memoryview(path.read_bytes())).hexdigest()}"}


def load(web: Web, verify: dict[str, str], **options: object) -> dict[str, torch.Tensor]:
    with settings.override(**SMALL):
        weights = weightload.safetensors_weights_iterator([web.address(NAME)], to_cpu=True, verify=verify, **options)  # type: ignore[arg-type]
        return dict(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_one(model: Path, kind: str, way: str) -> None:
    want = load_file(model)
    with serving(model.parent) as web:
        got = load(web, right(model, kind))
        assert {headers.get("User-Agent") == AGENT for headers in web.headers[1:]} == {way == "direct"}
        asked = sorted(
            tuple(map(int, found.removeprefix("bytes=").split("-"))) for _, _, found in web.asked[1:] if found
        )
        assert asked[-1][1] == model.stat().st_size - 1
        assert all(end + 1 == begin for (_, end), (begin, _) in itertools.pairwise(asked))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_one(model: Path, kind: str, way: str) -> None:
    with serving(model.parent) as web:
        with pytest.raises(ChecksumError, match="should be") as raised:
            load(web, {NAME: f"{kind}:{'0' * len(right(model, kind)[NAME].partition(':')[2])}"})
        assert raised.value.filename == web.address(NAME)


@pytest.mark.parametrize("at", [300_000, 5 << 20, -1])
def test_a_damaged_answer(model: Path, at: int, way: str) -> None:
    """The digest is of what came, not of what the server has."""
    with serving(model.parent) as web:
        damaged = damage_once(web, model, at % model.stat().st_size)
        with pytest.raises(ChecksumError):
            load(web, right(model, "crc32c"))
        assert damaged


def test_what_was_left_out_is_asked_for(model: Path, way: str) -> None:
    with serving(model.parent) as web:
        assert load(web, right(model, "crc32c"), names={"03", "06"}).keys() == {"03", "06"}
        damage_once(web, model, model.stat().st_size - 5)  # in 07
        with pytest.raises(ChecksumError):
            load(web, right(model, "crc32c"), names={"03", "06"})


def test_into_parameters_and_on_several_threads(model: Path, way: str) -> None:
    want = load_file(model)
    with serving(model.parent) as web:
        into = {name: torch.empty_like(tensor) for name, tensor in want.items()}
        weightload.load_into(into, [web.address(NAME)], verify=right(model, "crc64nvme"))
        assert all(torch.equal(into[name], want[name]) for name in want)
        assert web.headers[1:]


def test_a_load_that_was_left(model: Path, way: str) -> None:
    with serving(model.parent) as web, settings.override(**SMALL):
        weights = weightload.safetensors_weights_iterator(
            [web.address(NAME)], to_cpu=True, verify=right(model, "crc32c")
        )
        next(weights)
        weights.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]


class Object:
    """Stands for a server's."""

    def __init__(self, data: bytes, start: int) -> None:
        self.where, self.start = "here", memoryview(data)[:start]
        self.tap: CrcTap | None = None


def combined(reading: CrcReading, data: bytes) -> str:
    whole = Crc("crc32c")
    for begin, end, crc in reading.in_order(len(data)):
        whole.append(crc if crc is not None else crc_of("crc32c", memoryview(data)[begin:end]))
    return whole.hexdigest()


def test_answers_in_any_order_twice_and_across() -> None:
    data = bytes(range(256)) * 4
    want = crc_of("crc32c", memoryview(data)).hexdigest()
    remote = Object(data, 100)
    ours = CrcTap(remote, 8, "crc32c")
    assert remote.tap is ours
    ours.give(0, data[:8])
    assert not ours.used
    ours.give(600, data[600:1024])
    ours.give(50, data[50:300])  # across the beginning
    ours.give(600, data[600:1024])  # the same once more
    assert ours.used
    assert len(ours.readings) == 1
    assert [(begin, end) for begin, end, crc in ours.readings[0].in_order(len(data)) if crc is None] == [(300, 600)]
    assert combined(ours.readings[0], data) == want
    ours.give(250, data[250:650])
    ours.give(600, b"x" + data[601:1024])  # not the same
    assert len(ours.readings) == 3
    assert [combined(reading, data) == want for reading in ours.readings] == [True, True, False]
    with pytest.raises(ReadError, match="two different answers"):
        ours.give(99, b"y" * 10)
    ours.close()
    assert remote.tap is None


def test_pieces_that_touch() -> None:
    reading = CrcReading("crc32c", memoryview(b""))
    crc = Crc("crc32c")
    assert reading.put(10, Piece(20, crc))
    assert reading.put(20, Piece(30, crc))
    assert reading.put(0, Piece(10, crc))
    for begin, end in ((9, 11), (0, 30), (29, 30), (15, 16), (10, 21)):
        assert not reading.put(begin, Piece(end, crc))


AT_START = """
import sys, threading
import weightload

start = threading.Thread.start
weights = None


def interrupted(thread):
    start(thread)
    if thread.name == "weightload-verify":
        HANDLER


threading.Thread.start = interrupted
verify = dict(zip((path.rpartition("/")[2] for path in sys.argv[1::2]), sys.argv[2::2]))
try:
    options = {'duplicates': 'last', 'to_cpu': True}
    weights = weightload.safetensors_weights_iterator(sys.argv[1::2], verify=verify, **options)
    for _ in weights:
        pass
except (KeyboardInterrupt, weightload.errors.WeightLoadError) as error:
    print(type(error).__name__)
if weights is not None:
    weights.close()
    weights.close()
del weights
"""


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("handler", ["raise KeyboardInterrupt", "weights is not None and weights.close()"])
def test_a_signal_handler_while_threads_are_started(model: Path, handler: str, remote: bool) -> None:
    """One that raises, or that closes the load: neither waits for ever, then or later."""
    files = [model, Path(shutil.copy(model, model.with_name("another.safetensors")))]
    with serving(model.parent) as web:
        named = []
        for path in files:
            digest = crc_of("crc32c", memoryview(path.read_bytes())).hexdigest()
            named += [web.address(path.name) if remote else str(path), f"crc32c:{digest}"]
        command = [sys.executable, "-c", AT_START.replace("HANDLER", handler), *named]
        ended = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if "raise" in handler:
        assert ended.stdout == "KeyboardInterrupt\n"
