"""cache=: what servers have is written to a folder while it is loaded, whole or not at all, and loaded from there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import email.utils
import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Handler, Web, environment, hang, serving

import weightload
from weightload._cache import copies
from weightload._cache import folder as caches
from weightload._remote.answers import FIRST_BYTES
from weightload._remote.source import open_addresses
from weightload.errors import CacheError, ChecksumError, ReadError, WeightLoadError

NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of four pieces each."""
    path = tmp_path / "served"
    path.mkdir()
    for number, name in enumerate(NAMES):
        save_file({f"{number}.{i}": torch.randn(1500, 1031) for i in range(5)}, path / name)
    return path


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "some" / "cache"


def addresses(web: Web) -> list[str]:
    return [web.address(name) for name in NAMES]


def expected(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in NAMES for name, tensor in load_file(folder / file).items()}


def require_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def load(files: list[str] | str, cache: Path | None, **options: object) -> dict[str, torch.Tensor]:
    return dict(weightload.safetensors_weights_iterator(files, to_cpu=True, cache=cache, **options))  # type: ignore[arg-type]


def files_in(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if not path.is_dir())


def copies_of(folder: Path, cache: Path) -> bool:
    """Whether that is what is in it, and nothing else."""
    found = files_in(cache)
    return sorted(path.name for path in found) == NAMES and all(
        path.read_bytes() == (folder / path.name).read_bytes() for path in found
    )


def python(script: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    child: subprocess.Popen[str] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    children.append(child)
    return child


children: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    yield
    for child in children:
        child.kill()  # nothing to one that has ended
    children.clear()


CALLS: dict[str, Callable[[list[str], Path | None, dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "iterator": lambda files, cache, want: load(files, cache),
    "private memory": lambda files, cache, want: load(files, cache, backend="pread"),
    "load_file": lambda files, cache, want: {
        name: tensor for file in files for name, tensor in weightload.load_file(file, cache=cache).items()
    },
    "load_into": lambda files, cache, want: into(files, cache, want),
    "renamed": lambda files, cache, want: load(files, cache, rename=lambda name: name),
}


def into(files: list[str], cache: Path | None, want: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    target = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    weightload.load_into(target, files, cache=cache)
    return target


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ranges", [True, False])
def test_filled_on_the_way_and_used_then(web: Web, folder: Path, cache: Path, call: str, ranges: bool) -> None:
    web.ranges = ranges
    want = expected(folder)
    CALLS[call](addresses(web), None, want)
    without = sorted(web.asked, key=repr)
    web.asked.clear()
    require_same(CALLS[call](addresses(web), cache, want), want)
    assert sorted(web.asked, key=repr) == without  # nothing is asked for only to be written
    assert copies_of(folder, cache)
    web.asked.clear()
    require_same(CALLS[call](addresses(web), cache, want), want)
    if ranges:
        assert [found for _, _, found in web.asked] == ["bytes=0-0"] * 2  # one question each
    else:
        assert len(web.asked) == 4  # the first time it does not know ranges
    assert copies_of(folder, cache)


def test_loads_read_the_copies(web: Web, cache: Path) -> None:
    load(addresses(web), cache)
    with weightload.safetensors_weights_iterator(addresses(web), to_cpu=True, cache=cache) as weights:
        list(weights)
        assert [file.path for file in weights.stats().files] == sorted(
            map(str, files_in(cache)), key=lambda path: os.path.basename(path)
        )


def test_one_file_of_two_is_there(web: Web, folder: Path, cache: Path) -> None:
    weightload.load_file(addresses(web)[1], cache=cache)
    web.asked.clear()
    require_same(load(addresses(web), cache), expected(folder))
    assert [found for _, path, found in web.asked if NAMES[1] in path] == ["bytes=0-0"]
    assert copies_of(folder, cache)


def test_a_handle_uses_copies_and_makes_none(web: Web, folder: Path, cache: Path) -> None:
    want = load_file(folder / NAMES[0])
    for _ in range(2):
        with weightload.safe_open(addresses(web)[0], cache=cache) as handle:
            require_same({name: handle.get_tensor(name) for name in handle}, want)
        assert not cache.exists()
    load(addresses(web), cache)
    web.asked.clear()
    with weightload.safe_open(addresses(web)[0], cache=cache) as handle:
        require_same({name: handle.get_tensor(name) for name in handle}, want)
    assert len(web.asked) == 1


@pytest.mark.parametrize("dated", [True, False])
def test_an_object_that_has_changed_is_loaded_anew(web: Web, folder: Path, cache: Path, dated: bool) -> None:
    """By its tag, and by its time where there is no tag. Its size is the same."""
    date = "Wed, 01 Jan 2025 00:00:00 GMT"

    def before(handler: Handler) -> bool:
        if dated:
            handler.extra = {"Last-Modified": date}
        return False

    web.tags, web.before = not dated, before
    load(addresses(web), cache)
    save_file({f"0.{i}": torch.full((1500, 1031), float(i)) for i in range(5)}, folder / NAMES[0])
    date = "Wed, 01 Jan 2025 00:00:01 GMT"
    require_same(load(addresses(web), cache), expected(folder))
    assert copies_of(folder, cache)  # and nothing of the old one
    web.asked.clear()
    require_same(load(addresses(web), cache), expected(folder))
    assert len(web.asked) == 2


def test_a_server_that_tells_no_change_is_refused(web: Web, cache: Path) -> None:
    web.tags = False
    with pytest.raises(CacheError, match="no tag, and no time"):
        load(addresses(web), cache)
    assert files_in(cache) == []


def test_a_time_that_may_still_be_that_of_another_change_is_refused(web: Web, cache: Path) -> None:
    def before(handler: Handler) -> bool:
        handler.extra = {"Last-Modified": email.utils.formatdate(time.time(), usegmt=True)}
        return False

    web.tags, web.before = False, before
    with pytest.raises(CacheError, match="no tag, and no time"):
        load(addresses(web), cache)
    assert files_in(cache) == []


def test_a_file_of_the_users_own_stays(web: Web, cache: Path) -> None:
    """With a wrong digest, in a folder that is the cache's, too."""
    own = cache / "mine" / "own.safetensors"
    own.parent.mkdir(parents=True)
    save_file({"own": torch.ones(3)}, own)
    with pytest.raises(ChecksumError):
        load([str(own), addresses(web)[0]], cache, verify={own.name: "0" * 64, NAMES[0]: "0" * 64})
    assert own.exists()
    assert files_in(cache) == [own]


@pytest.mark.parametrize("how", ["close", "next", "exit"])
def test_a_forked_child_leaves_the_copies_to_its_parent(web: Web, folder: Path, cache: Path, how: str) -> None:
    released = threading.Event()

    def before(handler: Handler) -> bool:
        if int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) >= 16 << 20:
            released.wait()
        return False

    web.before = before
    weights = weightload.safetensors_weights_iterator(addresses(web), device="cpu", cache=cache)
    got = dict([next(weights)])
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # which ends it, should it wait
        with contextlib.suppress(WeightLoadError):
            if how == "exit":
                copies._leave_interpreter()
            elif how == "next":
                list(weights)
                os._exit(1)
        weights.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    released.set()
    require_same(got | dict(weights), expected(folder))
    assert copies_of(folder, cache)


def test_what_is_gone_from_the_server_is_not_loaded(web: Web, folder: Path, cache: Path) -> None:
    load(addresses(web), cache)
    (folder / NAMES[0]).unlink()
    with pytest.raises(FileNotFoundError):
        load(addresses(web), cache)


def test_picked_tensors_fill_nothing_and_use_what_is_there(
    web: Web, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = expected(folder)
    written: list[int] = []
    write = copies.Copy.write

    def counted(self: copies.Copy, begin: int, data: memoryview) -> None:
        written.append(len(data))
        write(self, begin, data)

    monkeypatch.setattr(copies.Copy, "write", counted)
    require_same(load(addresses(web), cache, names={"0.3"}), {"0.3": want["0.3"]})
    assert len(load(addresses(web), cache, shard=lambda name, shape, dtype: (slice(0, 10),))) == 10
    assert not cache.exists()
    weightload.load_into({"0.3": torch.zeros(1500, 1031)}, addresses(web), strict=False, cache=cache)
    assert sum(written) <= 2 * (256 << 10)  # the headers' answers, before it was known what is wanted
    load(addresses(web), cache, rename=lambda name: None if name[-1] != "3" else name)
    assert files_in(cache) == []
    load(addresses(web), cache)
    web.asked.clear()
    require_same(load(addresses(web), cache, names={"0.3"}), {"0.3": want["0.3"]})
    assert len(web.asked) == 2


def test_the_little_that_a_load_leaves_out_is_asked_for(folder: Path, cache: Path) -> None:
    path = folder / NAMES[0]
    save_file({"a": torch.randn(9, 1 << 18), "b": torch.randn(1 << 18), "c": torch.randn(9, 1 << 18)}, path)
    with serving(folder) as web:
        assert load([web.address(path.name)], cache, rename={"b": None}).keys() == {"a", "c"}
        assert [found.read_bytes() for found in files_in(cache)] == [path.read_bytes()]
        asked = [tuple(map(int, found.removeprefix("bytes=").split("-"))) for _, _, found in web.asked if found]
        assert sum(end + 1 - begin for begin, end in asked) <= path.stat().st_size + (256 << 10)  # the header's answer


def test_an_index_on_the_server_speaks_of_copies_too(web: Web, folder: Path, cache: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, folder / NAMES[0])
    save_file({"a": torch.ones(3)}, folder / NAMES[1])
    index = {"weight_map": {"a": NAMES[1], "b": NAMES[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    files = weightload.resolve_safetensors_files(web.url)
    for _ in range(2):
        assert load(files, cache)["a"].sum() == 3
    assert copies_of(folder, cache)


# Copies that cannot be kept, or used.


def test_a_disk_that_is_full(web: Web, folder: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", cache], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        for call in ("iterator", "load_file", "load_into"):
            with pytest.raises(CacheError) as raised:
                CALLS[call](addresses(web), cache, expected(folder))
            assert raised.value.errno == errno.ENOSPC
            assert raised.value.filename is not None
            assert raised.value.filename.startswith(str(cache))
            assert str(cache) in str(raised.value)
            assert raised.value.offset is not None
            assert files_in(cache) == []
    finally:
        subprocess.run(["umount", cache], check=True)


def test_a_file_that_may_not_grow(web: Web, cache: Path) -> None:
    script = """
        import sys, weightload
        try:
            dict(weightload.safetensors_weights_iterator(sys.argv[2:], to_cpu=True, cache=sys.argv[1]))
        except weightload.errors.CacheError as error:
            print(error.errno, error.offset)
    """
    limit = (20 << 20, 20 << 20)
    child = python(script, cache, *addresses(web), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    out, _ = child.communicate(timeout=120)
    assert out.startswith(f"{errno.EFBIG} ")
    assert files_in(cache) == []


def test_no_folder(web: Web, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for call in ("iterator", "load_file", "load_into"):
        with pytest.raises(CacheError, match="file") as raised:
            CALLS[call](addresses(web), tmp_path / "file" / "below", expected(folder))
        assert raised.value.errno == errno.ENOTDIR
    for wrong, kind in ((3, TypeError), ("s3://bucket", ValueError), ("", FileNotFoundError)):
        with pytest.raises(kind):
            load(addresses(web), wrong)  # type: ignore[arg-type]


def test_copies_can_be_used_in_a_folder_that_is_read_only(web: Web, folder: Path, cache: Path) -> None:
    load(addresses(web), cache)
    mounted = subprocess.run(["mount", "--bind", cache, cache], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", cache], check=True)
        require_same(load(addresses(web), cache), expected(folder))
        (folder / "other.safetensors").write_bytes((folder / NAMES[0]).read_bytes())
        with pytest.raises(CacheError) as raised:
            load(web.address("other.safetensors"), cache)
        assert raised.value.errno == errno.EROFS
    finally:
        subprocess.run(["umount", cache], check=True)


@pytest.mark.parametrize("damage", ["shorter", "longer", "header", "empty"])
def test_a_copy_that_is_damaged_is_made_anew(web: Web, folder: Path, cache: Path, damage: str) -> None:
    load(addresses(web), cache)
    path = files_in(cache)[0]
    data = path.read_bytes()
    path.write_bytes({"shorter": data[:-1], "longer": data + b"x", "header": b"x" * len(data), "empty": b""}[damage])
    require_same(load(addresses(web), cache), expected(folder))
    assert copies_of(folder, cache)


@pytest.mark.parametrize("what", ["link", "fifo", "link to a folder"])
def test_what_is_no_file_in_the_place_of_a_copy(web: Web, folder: Path, cache: Path, tmp_path: Path, what: str) -> None:
    load(addresses(web), cache)
    path = files_in(cache)[0]
    elsewhere = tmp_path / "elsewhere" / path.name
    elsewhere.parent.mkdir()
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
    save_file(other, elsewhere)  # of the same size
    assert elsewhere.stat().st_size == path.stat().st_size
    before = elsewhere.read_bytes()
    path.unlink()
    if what == "link to a folder":
        path.parent.rmdir()
        path.parent.symlink_to(elsewhere.parent)
        with pytest.raises(CacheError) as raised:
            load(addresses(web), cache)
        assert raised.value.errno == errno.ENOTDIR
    else:
        path.symlink_to(elsewhere) if what == "link" else os.mkfifo(path)
        require_same(load(addresses(web), cache), expected(folder))
        assert copies_of(folder, cache)
        assert stat.S_ISREG(path.lstat().st_mode)
    assert elsewhere.read_bytes() == before


def test_a_folder_in_the_place_of_a_copy(web: Web, cache: Path) -> None:
    load(addresses(web), cache)
    path = files_in(cache)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(CacheError) as raised:
        load(addresses(web), cache)
    assert raised.value.errno == errno.EISDIR
    assert raised.value.filename == str(path)


def test_what_was_wrong_has_no_copy(web: Web, folder: Path, cache: Path) -> None:
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    with pytest.raises(ChecksumError):
        load(addresses(web), cache, verify=digests | {NAMES[0]: "0" * 64})
    assert files_in(cache) == []
    require_same(load(addresses(web), cache, verify=digests), expected(folder))
    assert copies_of(folder, cache)


def test_no_copy_has_its_name_before_the_verdict(
    web: Web, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file's bytes come when the first one's are written."""
    done: list[str] = []
    whole = threading.Event()
    write, seal, finish = copies.Copy.write, copies.Copies._seal, copies.Copies.finish

    def written(self: copies.Copy, begin: int, data: memoryview) -> None:
        write(self, begin, data)
        if self.is_whole and NAMES[0] in self.path:
            whole.set()

    def before(handler: Handler) -> bool:
        if NAMES[1] in handler.path and not handler.headers["Range"].startswith("bytes=0-"):
            assert whole.wait(60)
        return False

    monkeypatch.setattr(copies.Copy, "write", written)
    monkeypatch.setattr(copies.Copies, "_seal", lambda *given: (done.append("seal"), seal(*given)))
    monkeypatch.setattr(copies.Copies, "finish", lambda *given: (done.append("finish"), finish(*given)))
    web.before = before
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    load(addresses(web), cache, verify=digests)
    assert done == ["finish", "seal", "seal"]
    assert copies_of(folder, cache)
    done.clear()
    whole.clear()
    load(addresses(web), cache.with_name("other"))
    assert done[0] == "seal"


def test_a_copy_that_has_become_wrong_goes_when_it_is_checked(web: Web, folder: Path, cache: Path) -> None:
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    load(addresses(web), cache)
    with open(files_in(cache)[0], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ChecksumError):
        load(addresses(web), cache, verify=digests)
    require_same(load(addresses(web), cache, verify=digests), expected(folder))
    assert copies_of(folder, cache)


# Loads that do not end, and several at once.


def test_a_load_that_is_left_leaves_nothing(web: Web, cache: Path) -> None:
    asked = hang(web, NAMES[0], 16 << 20)
    for leave in ("close", "break", "raise"):
        weights = weightload.safetensors_weights_iterator(addresses(web)[:1], to_cpu=True, cache=cache)
        assert asked.wait(60)
        if leave == "close":
            weights.close()
        elif leave == "break":
            next(iter(weights))
            del weights
        else:
            with pytest.raises(ZeroDivisionError), weights:
                1 / 0  # noqa: B018
        assert files_in(cache) == []
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"weightload-cache", "weightload-sync"}


def test_a_load_that_fails_leaves_whole_copies_only(web: Web, cache: Path) -> None:
    def before(handler: Handler) -> bool:
        if NAMES[1] in handler.path and not handler.headers.get("Range", "").startswith("bytes=0-"):
            handler.reply(416)
            return True
        return False

    web.before = before
    with pytest.raises(ReadError) as raised:
        load(addresses(web), cache)
    assert not isinstance(raised.value, CacheError)
    assert {path.name for path in files_in(cache)} <= {NAMES[0]}


SCRIPT = """
    import sys, weightload
    try:
        print(len(dict(weightload.safetensors_weights_iterator(sys.argv[2:], to_cpu=True, cache=sys.argv[1]))))
    except KeyboardInterrupt:
        print("stopped")
"""


def test_ctrl_c(web: Web, cache: Path) -> None:
    asked = hang(web, NAMES[0], 16 << 20)
    child = python(SCRIPT, cache, *addresses(web))
    assert asked.wait(60)
    assert files_in(cache) != []
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert out == "stopped\n"
    assert {path.name for path in files_in(cache)} <= {NAMES[1]}


def test_the_exit_in_the_middle_of_a_load(web: Web, cache: Path) -> None:
    asked = hang(web, NAMES[0], 16 << 20)
    script = """
        import sys, weightload
        weights = weightload.safetensors_weights_iterator(sys.argv[2:], to_cpu=True, cache=sys.argv[1])
        sys.stdin.read()
    """
    child = python(script, cache, addresses(web)[0], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert asked.wait(60)
    _, told = child.communicate("", timeout=60)
    assert child.returncode == 0
    assert told == ""
    assert files_in(cache) == []


def test_what_dead_processes_left_is_swept_and_what_live_ones_write_is_not(web: Web, folder: Path, cache: Path) -> None:
    asked = hang(web, NAMES[0], 16 << 20)
    child = python(SCRIPT, cache, addresses(web)[0])
    assert asked.wait(60)
    (part,) = files_in(cache)
    web.before = lambda handler: False
    require_same(load(addresses(web)[1], cache), load_file(folder / NAMES[1]))
    assert part.exists()
    child.kill()
    child.communicate(timeout=60)
    assert part.exists()
    load(addresses(web), cache)
    assert copies_of(folder, cache)


def test_a_part_that_is_swept_before_it_is_locked(
    web: Web, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = fcntl.flock, []

    def swept_first(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_SH and len(swept) < 3:
            (part,) = [path for path in files_in(cache) if path not in swept and path.name.endswith("-1.part")]
            copies.sweep(str(part))
            assert not part.exists()
            swept.append(part.with_name("another"))
        lock(descriptor, how)

    monkeypatch.setattr(copies.fcntl, "flock", swept_first)
    require_same(weightload.load_file(addresses(web)[0], cache=cache), load_file(folder / NAMES[0]))
    assert len(swept) == 3
    assert [path.read_bytes() for path in files_in(cache)] == [(folder / NAMES[0]).read_bytes()]


def test_two_processes_at_once(web: Web, folder: Path, cache: Path) -> None:
    opened: list[str] = []
    both = threading.Event()

    def before(handler: Handler) -> bool:
        if handler.headers.get("Range", "").startswith("bytes=0-"):
            opened.append(handler.path)
            if len(opened) == 4:
                both.set()
        else:
            both.wait(60)  # bytes only when both have begun
        return False

    web.before = before
    children = [python(SCRIPT, cache, *addresses(web)) for _ in range(2)]
    assert [child.communicate(timeout=120)[0] for child in children] == ["10\n", "10\n"]
    assert both.is_set()
    assert copies_of(folder, cache)
    web.before, web.asked = lambda handler: False, []
    require_same(load(addresses(web), cache), expected(folder))
    assert len(web.asked) == 2


def test_a_worker_that_has_much_to_do_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MOST_WAITING", 10)
    worker, gate = copies.Worker("test"), threading.Event()
    try:
        assert worker.submit(gate.wait, 10) is None  # type: ignore[arg-type]
        room = worker.submit(lambda: None, 1)
        assert room is not None
        assert not room.done()
        gate.set()
        room.result(60)
        worker.drain()
        assert worker.submit(lambda: None, 10) is None
    finally:
        gate.set()
        worker.close()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_answer_waits_until_it_is_taken(web: Web, folder: Path, ranges: bool) -> None:
    web.ranges = ranges
    sources: list[Any] = []
    (file,) = open_addresses(addresses(web)[:1], lambda address, source: sources.append(source))
    begun, taken = threading.Event(), concurrent.futures.Future[None]()
    data = bytearray()

    async def saver(begin: int, piece: Any) -> None:
        assert begin == 1 << 20
        data.extend(piece)
        begun.set()
        await asyncio.wrap_future(taken)

    (source,) = sources
    source.saver = saver
    answer = source.ask(1 << 20, 1 << 20)
    assert begun.wait(60)
    assert not answer.wait(0)
    taken.set_result(None)
    assert answer.wait(60)
    assert bytes(answer.bytes()) == bytes(data) == (folder / NAMES[0]).read_bytes()[1 << 20 : 2 << 20]
    assert file.is_remote


# Names.


def test_addresses_never_meet_and_lead_nowhere(tmp_path: Path) -> None:
    there = [
        "http://host/a/model.safetensors",
        "https://host/a/model.safetensors",
        "http://host:81/a/model.safetensors",
        "http://host/b/model.safetensors",
        "http://host/a/model.safetensors?versionId=1",
        "http://host/a/model.safetensors?versionId=2",
        "http://host/a/model.safetensors?name=a+b",
        "http://host/a/model.safetensors?name=a%20b",
        "http://host/a/model.safetensors?name",
        "http://host/a/model.safetensors?name=",
        "http://host/a%2Fmodel.safetensors",
        "http://host/../../../etc/passwd",
        "http://host/%2e%2e/%2e%2e/x.safetensors",
        "http://host/..",
        "http://host/a/..%00",
        "http://host/" + 5000 * "x",
        "http://host/" + 5000 * "x" + "y",
        "s3://bucket/a",
        "s3://bucket/A",
        "s3://bucket/a/../b",
        "s3://bucket/.weightload-00.part",
        "gs://bucket/a",
        "az://bucket/a",
    ]
    assert len({caches.key_of(address) for address in there}) == len(there)
    for address in there:
        assert caches.PLAIN_NAME.fullmatch(caches.name_of_copy(address))
        path = tmp_path / f"{caches.key_of(address)}.{24 * 'f'}" / caches.name_of_copy(address)
        assert os.path.normpath(path) == str(path)
        assert len(path.name) <= 255
        path.parent.mkdir()
        path.touch()
    assert len(files_in(tmp_path)) == len(there)


def test_signatures_and_names_do_not_make_another_object() -> None:
    plain = caches.key_of("https://host/a?versionId=1")
    for query in (
        "versionId=1&X-Amz-Signature=5&X-Amz-Date=7",
        "X-Goog-Signature=5&versionId=1",
        "sv=2021&versionId=1&se=2030&sig=A%2FB&sp=r",
    ):
        assert caches.key_of(f"https://me:password@HOST/a?{query}") == plain
    assert caches.key_of("https://host/a?versionId=1&sp=r") != plain  # no signature has this alone


def test_a_bucket_of_another_store_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one")
    one = caches.key_of("s3://bucket/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://two")
    assert caches.key_of("s3://bucket/a") != one


def test_no_secret_is_in_the_folder(web: Web, folder: Path, cache: Path) -> None:
    address = f"http://me:PASSWORD@{web.url[7:]}/{NAMES[0]}?X-Amz-Signature=SIGNATURE&token=TOKEN"
    load(address, cache)
    told = "".join(map(str, cache.rglob("*")))
    for path in files_in(cache):
        told += repr([(name, os.getxattr(path, name)) for name in os.listxattr(path)])
        assert path.read_bytes() == (folder / NAMES[0]).read_bytes()
    assert not any(word in told for word in ("PASSWORD", "SIGNATURE", "TOKEN", "me:"))
    web.asked.clear()
    load(address.replace("SIGNATURE", "ANOTHER").replace("PASSWORD", "OTHER"), cache)
    assert len(web.asked) == 1
    (folder / NAMES[0]).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load(address, cache)
    assert not any(word in str(raised.value) for word in ("PASSWORD", "SIGNATURE", "TOKEN"))


# Ranks.

RANKS = """
    import json, os, resource, sys, torch, weightload
    import torch.distributed as dist
    from datetime import timedelta

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.group.WORLD
    cache, out, *files = sys.argv[1:]

    def load(strategy, cache=cache, **options):
        weights = weightload.safetensors_weights_iterator(
            files, device="cpu", group=world, strategy=strategy, cache=cache, **options
        )
        got = {name: tensor.clone() for name, tensor in weights}
        told["local"] = [file.path.startswith("/") for file in weights.stats().files]
        return got

    def failure(of):
        try:
            of()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    def later():  # what is written when a rank ends is there when all have
        dist.barrier()
        return sorted(name for _, _, names in os.walk(cache) for name in names) if os.path.exists(cache) else []

    told = {}
"""


def ranks(script: str, cache: Path, out: Path, files: list[str], count: int = 2) -> list[dict[str, Any]]:
    """Run a script on several ranks, and return what each has told."""
    path = out / "ranks.py"
    end = 'json.dump(told, open(f"{out}/{rank}.json", "w"))\ndist.destroy_process_group()\n'
    path.write_text(textwrap.dedent(RANKS) + textwrap.dedent(script) + end)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with environment(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"):
        done = subprocess.run(
            [*launch, str(path), str(cache), str(out), *files], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]


def test_ranks_fill_a_folder_together(web: Web, folder: Path, cache: Path, tmp_path: Path) -> None:
    script = """
        want = torch.load(f"{out}/want", mmap=True)
        for strategy in ("striped", "broadcast", "independent"):
            cache = f"{sys.argv[1]}-{strategy}"
            for number in range(2):
                got = load(strategy, cache)
                assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)
                told[strategy] = later()
                if rank == 0:
                    os.mkdir(f"{out}/marks/{strategy}{number}")  # by which requests are counted
                dist.barrier()
        cache = f"{sys.argv[1]}-into"
        for _ in range(2):
            target = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
            weightload.load_into(target, files, group=world, strategy="striped", cache=cache)
            assert all(torch.equal(target[name], want[name]) for name in want)
        told["into"] = later()
    """
    torch.save(expected(folder), tmp_path / "want")
    marks = tmp_path / "marks"
    marks.mkdir()
    asked: dict[str, list[tuple[int, int]]] = {}

    def before(handler: Handler) -> bool:
        """Requests by how many loads had ended before."""
        done = sorted(os.listdir(marks))
        begin, end = handler.headers["Range"].removeprefix("bytes=").split("-")
        asked.setdefault(" ".join(done[-6:]), []).append((int(begin), int(end) + 1))
        return False

    web.before = before
    told = ranks(script, cache, tmp_path, addresses(web))
    for one in told:
        assert one.pop("local") == [True, True]
    assert told == [dict.fromkeys(("striped", "broadcast", "independent", "into"), NAMES)] * 2
    for strategy in ("striped", "broadcast", "independent", "into"):
        assert copies_of(folder, cache.with_name(f"{cache.name}-{strategy}")), strategy
    size = sum((folder / name).stat().st_size for name in NAMES)
    loads = [sum(end - begin for begin, end in found) for found in asked.values()]
    beginnings = 2 * 2 * (256 << 10)
    assert len(loads) == 7
    assert size <= loads[0] <= size + 2 * beginnings  # striped: each byte once
    assert loads[1] == 4  # and then only questions
    assert size <= loads[2] <= size + 2 * beginnings
    assert loads[3] == 4
    assert 2 * size <= loads[4] <= 2 * size + 2 * beginnings  # each for itself
    assert loads[5] == 4


def test_ranks_that_do_not_end_together(web: Web, folder: Path, cache: Path, tmp_path: Path) -> None:
    script = """
        # One leaves before the end, after the first tensor.
        def leave():
            weights = weightload.safetensors_weights_iterator(
                files, device="cpu", group=world, strategy="striped", cache=cache
            )
            for _ in weights:
                if rank == 1:
                    weights.close()
                    return
        with weightload.settings.override(block_bytes=1 << 20, window_bytes=1 << 20, task_bytes=1 << 20, requests=1):
            told["left"] = failure(leave)
        told["after it was left"] = later()
        # Their folders differ.
        told["apart"] = failure(lambda: load("striped", f"{cache}{rank}"))
        # Only one has a folder.
        told["one"] = failure(lambda: load("striped", cache if rank else None))
        dist.barrier()
        # One cannot make its own.
        told["file"] = failure(lambda: load("striped", f"{cache}/file" if rank == 0 else f"{__file__}/below"))
        # One has a copy, the other has not.
        for number in range(2):
            if rank == 0:
                weightload.load_file(files[0], cache=f"{cache}-0")
            dist.barrier()
            told["mixed"] = failure(lambda: load("striped", f"{cache}-{rank}"))
        told["names"] = failure(lambda: load("striped", f"{cache}-names", names=[f"{rank}.1"]))
        told["nothing"] = later()
        # One looked before the copies were there.
        cache = f"{cache}-raced"
        told["filled"] = failure(lambda: load("striped", cache))
        told["copies"] = [later()]
        if rank == 1:
            from weightload._cache.folder import Cache

            Cache._look = lambda self, addresses: {}
        told["raced"] = failure(lambda: load("striped", cache))
        told["copies"].append(later())
        told["end"] = told.pop("local")
        # The disk of one is full.
        if rank == 1:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, before[1]))
        cache = f"{sys.argv[1]}-full"
        told["full"] = failure(lambda: load("striped", cache))
        told["after it was full"] = later()
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        # One has opened another state of the object, which ranks do not compare.
        from weightload._cache import folder

        state, cache = folder.state_of, f"{sys.argv[1]}-states"
        folder.state_of = lambda same: state((*same[:2], rank))
        told["states"] = failure(lambda: load("striped", cache))
        told["after other states"] = later()
    """
    told = ranks(script, cache, tmp_path, addresses(web))
    assert told[0]["left"].startswith("RankLeftError")
    assert told[1]["left"] == "none"
    for one in told:
        assert one["after it was left"] == one["nothing"] == []
        assert "one folder, on one node" in one["apart"]
        assert "different calls" in one["one"] or "another call" in one["one"]
        assert "ranks.py/below" in one["file"]
        assert "one folder, on one node" in one["mixed"]
        assert one["names"] == one["filled"] == one["raced"] == "none"
        assert one["copies"] == [NAMES, NAMES]
        assert one["end"] == [False, False]
        assert one["after it was full"] == one["after other states"] == []
        assert one["states"] == "none"
    assert "File too large" in told[1]["full"]
    assert told[0]["full"] == "none" or "File too large" in told[0]["full"]
    assert copies_of(folder, cache.with_name(f"{cache.name}-raced"))


def test_the_command(web: Web, folder: Path, cache: Path) -> None:
    """`weightload load --cache --verify` makes whole copies, and then loads from them; a wrong digest is an error."""

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "weightload", "load", web.url, "--cache", str(cache), "--verify", "sha256"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    index = {name: file for file in NAMES for name in load_file(folder / file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    first = run()
    assert first.returncode == 0, first.stderr
    assert copies_of(folder, cache)
    web.asked.clear()
    again = run()
    assert again.returncode == 0, again.stderr
    asked = [span for _, path, span in web.asked if path.endswith(".safetensors")]
    assert all(int(span.rpartition("-")[2]) < FIRST_BYTES for span in asked)  # headers, and the question of one byte
    (folder / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in NAMES))
    wrong = run()
    assert wrong.returncode == 1
    assert "0" * 64 in wrong.stderr
