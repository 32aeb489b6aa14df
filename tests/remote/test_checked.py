"""verify= of what servers have: on the bytes that were handed out, which leave the server once where that can be."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Handler, Web, damage_once, serving
from support.ranks.groups import assert_done, run_ranks

import weightload
from weightload._verify import tap
from weightload.errors import ChecksumError, ReadError

MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two of 24 MiB, in tensors of 2 MiB."""
    bits = torch.Generator().manual_seed(5)
    paths = []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        save_file({f"{number}.{i:02}": torch.randn(512, 1024, generator=bits) for i in range(12)}, path)
        paths.append(path)
    return paths


def digests(files: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def asked_of(web: Web) -> int:
    """Bytes that were asked for."""
    ranges = [handler.removeprefix("bytes=").split("-") for _, _, handler in web.asked if handler]
    return sum(int(end) + 1 - int(begin) for begin, end in ranges)


CALLS: dict[str, Callable[..., object]] = {
    "iterator": lambda path, **options: dict(weightload.safetensors_weights_iterator(path, to_cpu=True, **options)),
    "load_file": lambda path, **options: weightload.load_file(path, **options),
    "load_into": lambda path, **options: weightload.load_into(
        {f"0.{i:02}": torch.zeros(512, 1024) for i in range(12)}, path, **options
    ),
    "load_model": lambda path, **options: weightload.load_model(Model(), path, **options),
}


class Model(torch.nn.Module):
    """A model that has the first file's tensors."""

    def __init__(self) -> None:
        super().__init__()
        one = torch.nn.ParameterDict({f"{i:02}": torch.nn.Parameter(torch.zeros(512, 1024)) for i in range(12)})
        self.add_module("0", one)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_every_call(files: list[Path], call: str, ranges: bool) -> None:
    right = digests(files)[files[0].name]
    with serving(files[0].parent) as web:
        web.ranges = ranges
        address = web.address(files[0].name)
        CALLS[call](address, verify={files[0].name: right})
        if ranges:
            assert asked_of(web) < files[0].stat().st_size + 2 * MIB
        with pytest.raises(ChecksumError, match=right) as raised:
            CALLS[call](address, verify={files[0].name: "0" * 64})
        assert "0" * 64 in str(raised.value)
        assert raised.value.filename == address


@pytest.mark.parametrize("room", [512 << 20, 0])
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_answer_is_noticed_though_the_next_is_right(
    files: list[Path], call: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tap.Budget, "MOST", room)
    verify = digests(files)
    with serving(files[0].parent) as web:
        damaged = damage_once(web, files[0], 13 * MIB)
        with pytest.raises(ChecksumError):
            CALLS[call](web.address(files[0].name), verify=verify)
        assert damaged


def test_what_was_not_kept_is_asked_for_once_more(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap.Budget, "MOST", 0)
    with serving(files[0].parent) as web:
        weightload.load_file(web.address(files[0].name), verify=digests(files))
        assert asked_of(web) < 2 * files[0].stat().st_size + 2 * MIB


def test_the_beginning_is_compared(files: list[Path]) -> None:
    """It was read when the file was opened; the first tensors' bytes are asked for again with what follows."""
    with serving(files[0].parent) as web:
        weightload.load_file(web.address(files[0].name), verify=digests(files))
        answers = [begin for _, _, begin in web.asked if begin and not begin.startswith("bytes=0-262143")]
        assert min(int(begin.removeprefix("bytes=").split("-")[0]) for begin in answers) < tap_start(files[0])
        opening = itertools.count()
        damaged: list[str] = []

        def damage(handler: Handler) -> bool:
            if handler.headers["Range"] == "bytes=0-262143" and next(opening) == 0:
                return False
            damage_once(web, files[0], 200_000)
            answered = web.before(handler)
            web.before = damage if not answered else lambda handler: False
            damaged.extend([handler.path] * answered)
            return answered

        web.before = damage
        with pytest.raises(ReadError, match="two different answers"):
            weightload.load_file(web.address(files[0].name), verify=digests(files))
        assert damaged


def tap_start(path: Path) -> int:
    return min(256 << 10, path.stat().st_size)


class Object:
    """Stands for a server's object."""

    def __init__(self, data: bytes, start: int) -> None:
        self.where, self.data, self.start = "here", data, memoryview(data)[:start]
        self.tap: tap.Tap | None = None


def test_the_same_bytes_twice_are_two_readings() -> None:
    data = bytes(range(200))
    source = Object(data, 10)
    ours = tap.Tap(source, 8, tap.Budget())
    assert source.tap is ours
    ours.give(0, data[:8])
    assert not ours.used
    ours.give(0, data[:10])
    assert ours.used
    ours.give(5, data[5:50])
    ours.give(100, data[100:200])
    assert len(ours.readings) == 1
    ours.give(40, b"x" * 30)  # which the first has from 40 to 50
    ours.give(70, data[70:100])
    assert len(ours.readings) == 2
    first, second = ours.readings
    taken = b"".join(iter_taken(first, 50))
    assert taken == data[:50]
    assert first.take(50) is None
    assert first.gap(50, 200) == (50, 70, None)
    assert bytes(first.take(70) or b"") == data[70:100]
    assert bytes(first.take(170) or b"") == data[170:]
    assert second.gap(10, 200) == (10, 40, None)
    assert bytes(second.take(45) or b"") == b"x" * 25
    with pytest.raises(ReadError, match="two different answers"):
        ours.give(3, b"y" * 10)
    ours.close()
    assert source.tap is None


def iter_taken(reading: tap.Reading, end: int) -> list[bytes]:
    found, at = [], 0
    while at < end:
        piece = reading.take(at)
        assert piece is not None
        found.append(bytes(piece))
        at += len(piece)
    return found


def test_what_there_is_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap.Budget, "MOST", 60)
    data = bytes(range(200))
    budget = tap.Budget()
    ours = tap.Tap(Object(data, 0), 0, budget)
    ours.give(0, data[:50])
    ours.give(50, data[50:90])
    (reading,) = ours.readings
    assert reading.gap(60, 200) == (50, 90, hashlib.sha256(data[50:90]).digest())
    assert reading.take(0) is not None
    assert reading.take(50) is None  # and the first is let go of
    assert budget.take(60)
    budget.give_back(60)
    ours.give(90, data[90:150])
    assert bytes(reading.take(90) or b"") == data[90:150]
    ours.close()
    assert budget.take(60)


RANKS = """
import hashlib, json
from weightload import errors, settings
import safetensors.torch

options = json.loads(sys.argv[4])
digests, fails = options.pop("digests"), options.pop("fails")
folder, addresses = sys.argv[5], sys.argv[6:]
into, other = options.pop("into", False), options.pop("other", None)
whole = {}
for name in sorted(digests):
    whole |= safetensors.torch.load_file(os.path.join(folder, name))
if rank == 1:
    options |= other or {}
group = dist.group.WORLD
try:
    if into:
        target = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
        weightload.load_into(target, addresses, group=group, verify=digests, **options)
        got = target
    else:
        weights = weightload.safetensors_weights_iterator(
            addresses, device="cpu", group=group, verify=digests, **options)
        got = dict(weights)
    assert not fails, "no error"
    assert len(got) == len(options.get("names", whole))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in got.items())
except errors.ChecksumError as error:
    assert fails, error
    assert error.rank is not None and error.filename in addresses, (error.rank, error.filename)
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def run(web: Web, files: list[Path], folder: Path, fails: bool = False, size: int = 2, **options: object) -> None:
    import json

    given = {"digests": digests(files), "fails": fails, **options}
    addresses = [web.address(path.name) for path in files]
    assert_done(run_ranks(RANKS, size, folder, json.dumps(given), files[0].parent, *addresses))


@pytest.mark.parametrize("into", [False, True])
def test_one_rank_asks_and_checks(files: list[Path], tmp_path_factory: pytest.TempPathFactory, into: bool) -> None:
    with serving(files[0].parent) as web:
        run(web, files, tmp_path_factory.mktemp("ranks"), into=into)
        assert asked_of(web) < sum(path.stat().st_size for path in files) + 2 * MIB
        damaged = damage_once(web, files[1], 13 * MIB)
        run(web, files, tmp_path_factory.mktemp("ranks"), fails=True, into=into)
        assert damaged
        web.before = lambda handler: False
        wrong = digests(files) | {files[0].name: "0" * 64}
        run(web, files, tmp_path_factory.mktemp("ranks"), fails=True, into=into, digests=wrong)


def test_three_ranks(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(files[0].parent) as web:
        run(web, files, tmp_path_factory.mktemp("ranks"), size=3)
        run(
            web,
            files,
            tmp_path_factory.mktemp("ranks"),
            size=3,
            fails=True,
            digests=digests(files) | {files[1].name: "0" * 64},
        )


@pytest.mark.parametrize("at", [13 * MIB, 23 * MIB])
def test_each_rank_checks_the_stripes_that_it_was_given(
    files: list[Path], tmp_path_factory: pytest.TempPathFactory, at: int
) -> None:
    with serving(files[0].parent) as web:
        run(web, files, tmp_path_factory.mktemp("ranks"), strategy="striped")
        damaged = damage_once(web, files[1], at)
        run(web, files, tmp_path_factory.mktemp("ranks"), fails=True, strategy="striped")
        assert damaged


def test_what_only_one_rank_wants_that_one_checks(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first rank reads what both want; the second alone reads the last tensor of the second file."""
    first = [name for path in files for name in load_file(path)][:-1]
    other = {"other": {"names": [*first, "1.11"]}, "names": first}
    with serving(files[0].parent) as web:
        run(web, files, tmp_path_factory.mktemp("ranks"), **other)
        damaged = damage_once(web, files[1], files[1].stat().st_size - 5)
        run(web, files, tmp_path_factory.mktemp("ranks"), fails=True, **other)
        assert damaged
