"""A file that changes under a load: a clear error, or the bytes of the file that was opened."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS, file_bytes, start, write_tensors
from support.ways import PRIVATE_WAYS, TINY, WAYS, Way, assert_nothing_held, content, raw_bytes, way_of

import weightload
from weightload import _C, errors, settings
from weightload._checkpoint.selection import open_files
from weightload.cli import main as cli

LONG_AGO = 1_600_000_000
Change = Callable[[Path], None]


def overwrite(path: Path) -> None:
    """Other bytes in place, every one of them, header included."""
    with path.open("r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(bytes(255 - byte for byte in data))


def overwrite_one_byte(path: Path) -> None:
    with path.open("r+b") as file:
        last = file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(last)
        file.write(bytes([255 - byte[0]]))


def overwrite_with_another_checkpoint(path: Path) -> None:
    """Overwrite the file like a training run that saves over the old one: the same header and size, other bytes."""
    other = checkpoint(path.with_name("other"), seed=1)
    with path.open("r+b") as file:
        file.write(other.read_bytes())


def truncate(path: Path) -> None:
    os.truncate(path, 30_000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


CHANGES: list[Change] = [overwrite, overwrite_one_byte, overwrite_with_another_checkpoint, truncate, empty, grow]


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"1234567")
    other.rename(path)


def unlink(path: Path) -> None:
    path.unlink()


def touch_the_status(path: Path) -> None:
    """Change the file's status, and none of its bytes."""
    os.link(path, path.with_name("hard link"))
    path.chmod(0o600)
    os.chown(path, os.getuid(), os.getgid())
    path.rename(path.with_name("elsewhere"))


def read_it(path: Path) -> None:
    path.read_bytes()


HARMLESS: list[Change] = [replace, unlink, touch_the_status, read_it]


def checkpoint(path: Path, seed: int = 0) -> Path:
    """200 kB in tensors that share tasks and blocks; last modified long ago, so that any write shows."""
    write_tensors(path, [(f"{i}", "U8", [9000 + i]) for i in range(20)] + [("large", "F32", [6000])], seed=seed)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "c.safetensors")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return way_of(request)


@pytest.fixture(params=PRIVATE_WAYS)
def private_way(request: pytest.FixtureRequest) -> Way:
    return way_of(request)


@pytest.mark.parametrize("change", CHANGES)
def test_between_two_tensors(path: Path, change: Change) -> None:
    """Tensors yielded before the change are right. Those that follow are right or an error, and an error there is."""
    reference = content(path)
    with settings.override(**{**TINY, "window_bytes": 4096, "threads": 1}):
        weights = start([path], "pread")
        kept = dict([next(weights)])
        change(path)
        with pytest.raises(errors.ReadError) as caught:
            for name, tensor in weights:
                kept[name] = tensor
    assert caught.value.filename == str(path)
    assert caught.value.errno is None
    assert caught.value.offset is not None
    assert caught.value.tensor in reference
    assert caught.value.tensor not in kept
    words = "ended .* early|changed while it was read" if change in (truncate, empty) else "changed while it was read"
    assert caught.match(words)
    assert {name: raw_bytes(tensor) for name, tensor in kept.items()} == {name: reference[name] for name in kept}
    del caught
    assert_nothing_held()


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_file_under_the_name(path: Path, change: Change, backend: str) -> None:
    """The file that was opened is read to its end."""
    reference = content(path)
    with settings.override(**{**TINY, "window_bytes": 4096, "threads": 1}):
        weights = start([path], backend)
        kept = dict([next(weights)])
        change(path)
        kept.update(weights)
    assert {name: raw_bytes(tensor) for name, tensor in kept.items()} == reference


class ChangeBeforeRead:
    """Changes a file when a read begins that then is delayed, as a thread does in a ``with`` block around the load."""

    def __init__(self, path: Path, change: Change, call: int, delay_ms: int) -> None:
        self.late = False  # the read may have gone on before the change was made
        self._path, self._change, self._call, self._delay_ms = path, change, call, delay_ms
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._wait_and_change)

    def __enter__(self) -> None:
        self._before = time.monotonic()
        _C.arm_fault("delay", first=self._call, count=1, delay_ms=self._delay_ms)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._loaded.set()  # a load with fewer reads
        self._thread.join()
        _C.disarm_fault()

    def _wait_and_change(self) -> None:
        now = self._before
        while _C.reads_since_armed() <= self._call:
            self._before = now  # the delay begins later
            if self._loaded.wait(0.001):
                return
            now = time.monotonic()
        self._change(self._path)
        self.late = time.monotonic() - self._before >= self._delay_ms / 1000


def during(path: Path, change: Change, call: int, way: Way) -> dict[str, bytes]:
    """Load while the file changes before its ``call``-th read. Again, with a longer delay, if the change came late."""
    original = path.read_bytes()
    delay_ms = 40
    while True:
        path.write_bytes(original)
        os.utime(path, (LONG_AGO, LONG_AGO))
        changing = ChangeBeforeRead(path, change, call, delay_ms)
        try:
            with settings.override(**{**TINY, "read": "buffered"}), changing:
                loaded = way([path])
        except Exception:
            if not changing.late:
                raise
        else:
            if not changing.late:
                return loaded
        delay_ms *= 2


@pytest.mark.parametrize("change", [overwrite_with_another_checkpoint, truncate])
def test_before_any_read(path: Path, private_way: Way, change: Change) -> None:
    """Reads are those of headers, too. Never a mixture, whatever the read before which it happens."""
    original = path.read_bytes()
    reference = content(path)
    outcomes = []
    for call in (0, 1, 2, 4):
        path.write_bytes(original)
        try:
            assert during(path, change, call, private_way) == reference
            outcomes.append("bytes")
        except errors.WeightLoadError as error:
            assert error.filename == str(path)  # noqa: PT017
            outcomes.append("error")
    # Headers are read by one call, data by several after it: the change comes before the last of these.
    assert outcomes.count("error") >= 2, outcomes
    assert_nothing_held()


@pytest.mark.parametrize("change", [overwrite, overwrite_with_another_checkpoint, grow])
def test_before_the_header_is_read(path: Path, change: Change) -> None:
    """A header that changes before it is read is not taken for a bad one, nor for a good one of other bytes."""

    def read_the_header(paths: list[Path]) -> dict[str, bytes]:
        open_files(paths)
        return {}

    with pytest.raises(errors.ReadError, match="changed while it was read") as caught:
        during(path, change, 0, read_the_header)
    assert caught.value.filename == str(path)
    assert caught.value.offset == 0


@pytest.mark.parametrize("change", CHANGES)
def test_mapped_files_never_crash_on_the_way(path: Path, change: Change) -> None:
    """Views show what the file holds; what threads bring in after a change is an error."""
    path.unlink()
    write_tensors(path, [(f"{i}", "U8", [1 << 20]) for i in range(8)])
    os.utime(path, (LONG_AGO, LONG_AGO))
    with settings.override(window_bytes=4096, task_bytes=1 << 20, threads=1):
        weights = start([path], "mmap")
        next(weights)
        change(path)
        with pytest.raises(errors.ReadError):
            list(weights)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("elements", [1000, 500_000, 4_000_000])
def test_no_view_is_made_of_a_file_that_has_changed(path: Path, change: Change, elements: int) -> None:
    """A small cached file, which no thread brings in, gives no view either: touching what is gone ends the process."""
    path.unlink()
    write_tensors(path, [(name, "F32", [elements]) for name in "abc"])
    os.utime(path, (LONG_AGO, LONG_AGO))
    path.read_bytes()
    with weightload.safe_open(path) as handle, start([path], "mmap") as weights:
        handle.get_tensor("a")
        next(weights)
        change(path)
        changed = time.monotonic()
        for call in (
            lambda: handle.get_tensor("a"),
            lambda: handle.get_tensor("b"),
            lambda: handle.get_slice("c")[10:900],
        ):
            with pytest.raises(errors.ReadError, match=r"changed while it was read|the file ended .* early") as caught:
                call()
            assert caught.value.filename == str(path)
            assert caught.value.tensor in ("a", "b", "c")
            assert caught.value.offset is not None
        del call, caught
        while time.monotonic() < changed + 0.001:  # tensors that follow at once go by the last answer
            pass
        with pytest.raises(errors.ReadError):
            list(weights)


def test_what_was_handed_out_in_private_memory_stays(path: Path, private_way: Way) -> None:
    reference = content(path)
    loaded = private_way([path])
    overwrite(path)
    empty(path)
    assert loaded == reference


def test_views_of_a_mapped_file_show_what_it_holds(path: Path) -> None:
    """Pages that were written are one's own. The others show what others write to the file, as the guide says."""
    path.unlink()
    write_tensors(path, [("a", "U8", [1 << 20])])
    tensor = weightload.load_file(path)["a"]
    tensor[:4096] = 7
    overwrite_in_place = bytes(1 << 20)
    with path.open("r+b") as file:
        file.seek(-(1 << 20), os.SEEK_END)
        file.write(overwrite_in_place)
    assert torch.all(tensor[:4096] == 7)
    assert torch.all(tensor[8192:] == 0)
    replace(path)
    assert torch.all(tensor[8192:] == 0)


def test_a_handle_that_is_kept_open_notices(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = open_files([path])
    assert file.read_all() == path.stat().st_size
    file.header_digest()
    overwrite_one_byte(path)
    for call in (file.read_all, file.header_digest):
        with pytest.raises(errors.ReadError, match="changed while it was read"):
            call()


def test_verify_says_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = []

    def verify(paths: list[Path]) -> dict[str, bytes]:
        outcome.append(cli.main(["verify", str(paths[0])]))
        return {}

    during(path, overwrite_one_byte, 1, verify)
    assert outcome[-1] == 3
    assert "changed while it was read" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["/dev/shm", "/tmp"])
def test_writes_right_after_one_another(folder: str, tmp_path: Path) -> None:
    """Time stamps are as fine as it takes, where the kernel keeps fine ones: a write after our question shows."""
    if not os.access(folder, os.W_OK):
        pytest.skip(f"no {folder} here")
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 13):
        pytest.skip("kernels before 6.13 stamp with the ticks of their clock")
    if folder == "/tmp" and not _is_multigrain(Path(folder)):
        pytest.skip("a file system that stamps with the ticks of the clock")
    path = Path(folder) / f"weightload-{os.getpid()}.safetensors"
    try:
        write_tensors(path, [("a", "U8", [4096])])
        for _ in range(200):
            (file,) = open_files([path])
            overwrite_one_byte(path)
            with pytest.raises(errors.ReadError, match="changed while it was read"):
                file.read_all()
    finally:
        path.unlink()


def _is_multigrain(folder: Path) -> bool:
    folder = folder.resolve()
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    deepest = max((mount for mount in mounts if folder.is_relative_to(mount[1])), key=lambda mount: len(mount[1]))
    return deepest[2] in ("ext4", "xfs", "btrfs", "tmpfs")


def test_an_index_that_is_still_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index grows between the questions about it."""
    write_tensors(tmp_path / "a.safetensors", [("a", "U8", [1])])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "a.safetensors"}}')
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        with index.open("a") as file:
            file.write(" ")
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(errors.CheckpointError, match="changed while it was read"):
        weightload.resolve_safetensors_files(index)


def test_a_file_that_is_still_being_written(tmp_path: Path, way: Way) -> None:
    """Shorter than its header says at the opening, whatever comes later."""
    whole = checkpoint(tmp_path / "whole").read_bytes()
    path = tmp_path / "part.safetensors"
    for size in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(errors.HeaderError):
            way([path])
    path.write_bytes(file_bytes(b"{}"))
    assert way([path]) == {}
