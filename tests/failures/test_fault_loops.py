"""A fault at every single read, by every way in: the right bytes, or an error with its place and nothing left."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from conftest import evict, write_tensors
from support.ways import CPU_WAYS, SIMULATED_WAYS, Way, assert_nothing_held, content, descriptor_count, way_of

import weightload
from weightload import _C, errors, settings
from weightload.cli import main as cli

# Pieces that make few reads of a file that is too large to be left to page faults, which is what 2 MiB are.
PIECE = 1 << 20
PIECES = {
    "task_bytes": PIECE,
    "block_bytes": PIECE,
    "window_bytes": PIECE,
    "slot_bytes": PIECE,
    "pinned_bytes": 2 * PIECE,
    "device_block_bytes": PIECE,
    "threads": 2,
}
MOST_READS = 40  # more than any of the loads below makes
CONTINUED = ["interrupt", "short_read", "delay"]
ENDED = ["error", "end_of_file"]


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Way:
    return way_of(request)


# Only private memory is read past the page cache.
WAYS_AND_READS = pytest.mark.parametrize(
    ("way", "read"),
    [
        *((name, "buffered") for name in CPU_WAYS),
        *((name, "direct") for name in ("iterator-pread", "load_file-pread", "load_into", "prefetch-pread")),
        *(
            pytest.param(name, read, marks=pytest.mark.simulated)
            for name in SIMULATED_WAYS
            for read in ("buffered", "direct")
        ),
    ],
    indirect=["way"],
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files: one with a header of more than one read, one with tensors across tasks and blocks."""
    folder = tmp_path_factory.mktemp("faults")
    return [
        write_tensors(folder / "header.safetensors", [("long name" * 10_000, "U8", [5])]),
        write_tensors(folder / "d.safetensors", [("a", "F32", [30_000]), ("b", "U8", [3]), ("c", "U8", [2_500_000])]),
    ]


@WAYS_AND_READS
@pytest.mark.parametrize("fault", CONTINUED)
def test_what_is_continued(way: Way, files: list[Path], fault: str, read: str) -> None:
    reference = content(*files)
    with settings.override(**{**PIECES, "read": read}):
        for first in range(MOST_READS):
            evict(files)  # cold files are populated and read, warm ones one or the other
            _C.arm_fault(fault, first=first, count=1, delay_ms=1)
            assert way(files) == reference
            if _C.reads_since_armed() <= first:
                break
        else:
            raise AssertionError("more reads than expected")
        _C.arm_fault(fault, first=0, count=10**6)
        assert way(files) == reference


@WAYS_AND_READS
@pytest.mark.parametrize("count", [1, 10**6])
@pytest.mark.parametrize("fault", ENDED)
def test_what_ends_a_load(
    way: Way, files: list[Path], fault: str, count: int, read: str, request: pytest.FixtureRequest
) -> None:
    reference = content(*files)
    paths = [str(path) for path in files]
    descriptors = descriptor_count()
    failed = 0
    heard: list[tuple[int, str]] = []
    with settings.override(**{**PIECES, "read": read}):
        for first in range(MOST_READS):
            evict(files)
            _C.arm_fault(fault, first=first, count=count, error_number=errno.EIO)
            try:
                assert way(files) == reference
            except errors.ReadError as error:
                failed += 1
                heard.append((first, str(error)))
                assert error.filename in paths  # noqa: PT017
                assert error.filename in str(error)  # noqa: PT017
                assert error.offset is not None  # noqa: PT017
                # EFAULT: how the kernel says it of a page to be mapped that is not in the file any more.
                allowed = (errno.EIO,) if fault == "error" else (None, errno.EFAULT)
                assert error.errno in allowed  # noqa: PT017
            hit = _C.reads_since_armed() > first
            assert_nothing_held()
            if not hit:
                break
            # Only what merely fills the page cache may fail unheard; of a fault that stays, nothing.
            if count > 1 and "mmap" not in request.node.callspec.id:
                assert failed == first + 1 or fault == "end_of_file"
        else:
            raise AssertionError("more reads than expected")
        _C.disarm_fault()
        # Heard are at least the headers' three reads, and two of the tensors, or the first of a mapped file, behind
        # which the system may have read on, so that the rest is only mapped. Views of a handle have none, and a direct
        # read that ends early is done again through the page cache.
        case = request.node.callspec.id
        headers_only = "safe_open-mmap" in case or (read == "direct" and fault == "end_of_file")
        assert failed >= (3 if headers_only else 4 if "mmap" in case else 5), (first, heard)
        assert way(files) == reference  # the process can load again
    assert descriptor_count() == descriptors


@pytest.mark.parametrize("fault", [*CONTINUED, *ENDED])
def test_the_command_line(files: list[Path], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        for first in range(MOST_READS):
            _C.arm_fault(fault, first=first, count=1, error_number=errno.EIO, delay_ms=1)
            code = cli.main([command, str(files[0])])
            hit = _C.reads_since_armed() > first
            assert code == (3 if hit and fault in ENDED else 0)
            if code and fault == "error":
                output = capsys.readouterr()
                assert f"{files[0]}: " in output.out + output.err
                assert "errno 5" in output.out + output.err
            assert_nothing_held()
            if not hit:
                break


@pytest.mark.parametrize("fault", ENDED)
def test_resolving(files: list[Path], fault: str) -> None:
    for first in range(MOST_READS):
        _C.arm_fault(fault, first=first, count=1, error_number=errno.EIO)
        try:
            assert weightload.resolve_safetensors_files(files) == [str(path) for path in files]
        except errors.ReadError as error:
            assert error.filename in [str(path) for path in files]  # noqa: PT017
        else:
            assert _C.reads_since_armed() <= first
            break
        assert_nothing_held()
    assert first >= 3


@WAYS_AND_READS
def test_a_status_that_is_asked_for_again(way: Way, files: list[Path], read: str) -> None:
    """A file system in user space may answer a signal so."""
    reference = content(*files)
    with settings.override(**{**PIECES, "read": read}):
        for first in range(MOST_READS):
            _C.arm_fault("interrupt", first=first, count=20, statuses=True)
            assert way(files) == reference
            if _C.reads_since_armed() <= first:
                break


@WAYS_AND_READS
def test_a_status_that_cannot_be_had(way: Way, files: list[Path], read: str) -> None:
    reference = content(*files)
    before = descriptor_count()
    with settings.override(**{**PIECES, "read": read}):
        for first in range(MOST_READS):
            _C.arm_fault("error", first=first, count=10**6, error_number=errno.EIO, statuses=True)
            try:
                assert way(files) == reference  # where it was a question that needs no answer
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017
                assert error.filename in map(str, files)  # noqa: PT017
            if _C.reads_since_armed() <= first:
                break
        _C.disarm_fault()
    assert_nothing_held()
    assert way(files) == reference
    assert descriptor_count() == before
