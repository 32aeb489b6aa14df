"""Cached bytes are copied, without read calls, into memory that has its pages. Where that cannot be, they are read."""

from __future__ import annotations

import mmap
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TESTS, evict, on_a_local_disk, run_script, write_tensors
from safetensors.torch import load_file
from support.parts import empty_like, rank_of
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import weightload
from weightload import settings
from weightload._group.ranks import ranks_of_this_node, readers_of

pytestmark = pytest.mark.alone

SHAPES = {"odd": [3, 1000, 1001], "rows": [2048, 4096], "wide": [300, 65536], "small": [77]}
NOT_HERE = platform.machine() != "x86_64"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("copies") / "m.safetensors"
    write_tensors(path, [(name, "I16", shape) for name, shape in SHAPES.items()], pad_to=1)
    path.read_bytes()
    return path


def in_read_calls(load: Callable[[], Any]) -> int:
    """The bytes that came out of read calls of this process meanwhile."""

    def so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])

    before = so_far()
    load()
    return so_far() - before


def touched() -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, 7, dtype=torch.int16) for name, shape in SHAPES.items()}


def copied(file: Path) -> dict[str, torch.Tensor]:
    """Return the file's tensors as safetensors reads them, in memory of their own."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def check(target: dict[str, torch.Tensor], file: Path) -> None:
    expected = copied(file)
    assert target.keys() == expected.keys()
    for name, tensor in target.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.skipif(NOT_HERE, reason="there are no such stores, or nobody has looked what they are worth")
@pytest.mark.parametrize("task_bytes", [None, 3 << 20])
def test_memory_that_has_its_pages_is_filled_without_read_calls(file: Path, task_bytes: int | None) -> None:
    with settings.override(**({"task_bytes": task_bytes} if task_bytes else {})):
        target = touched()
        read = in_read_calls(lambda: weightload.load_into(target, file))
    check(target, file)
    assert read < 2 << 20 < file.stat().st_size // 8  # ends of tensors are too small to be worth it


def test_memory_that_nobody_has_touched_is_filled_by_read_calls(file: Path) -> None:
    """The kernel's zeros are in a cache then, and a store to them costs less."""
    memory = {name: mmap.mmap(-1, 2 * torch.Size(shape).numel()) for name, shape in SHAPES.items()}
    target = {name: torch.frombuffer(memory[name], dtype=torch.int16).reshape(shape) for name, shape in SHAPES.items()}
    read = in_read_calls(lambda: weightload.load_into(target, file))
    check(target, file)
    assert read > 0.9 * file.stat().st_size


@pytest.mark.parametrize("shared", [False, True])
def test_memory_of_files_is_filled_by_read_calls(file: Path, tmp_path: Path, shared: bool) -> None:
    """Its pages may go meanwhile, or be holes of a full disk: a store there ends the process."""
    target = {}
    for name, shape in SHAPES.items():
        (tmp_path / name).write_bytes(bytes(2 * torch.Size(shape).numel()))
        size = torch.Size(shape).numel()
        target[name] = torch.from_file(str(tmp_path / name), shared=shared, size=size, dtype=torch.int16).view(shape)
        target[name].fill_(7)  # also private copies of pages go with the end of their file
    assert in_read_calls(lambda: weightload.load_into(target, file)) > 0.9 * file.stat().st_size
    check(target, file)
    target = {name: torch.empty(shape, dtype=torch.int16).share_memory_().fill_(7) for name, shape in SHAPES.items()}
    assert in_read_calls(lambda: weightload.load_into(target, file)) > 0.9 * file.stat().st_size
    check(target, file)


@pytest.mark.skipif(NOT_HERE, reason="as above")
def test_columns_are_copied_piece_by_piece(file: Path) -> None:
    """Rows of 8 KiB, all of whose pages are wanted, and of 128 KiB."""
    whole = copied(file)
    with rank_of((2,), 1) as mesh:
        expected = {
            name: distribute_tensor(whole[name], mesh, [Shard(1)], src_data_rank=None) for name in ("rows", "wide")
        }
        target = {name: empty_like(shard) for name, shard in expected.items()}
        read = in_read_calls(lambda: weightload.load_into(target, file, strict=False))
        for name, shard in expected.items():
            assert torch.equal(target[name].to_local(), shard.to_local())
        assert read < 1 << 20 < sum(shard.to_local().nbytes for shard in expected.values()) // 16


@contextmanager
def bus_errors_handled() -> Iterator[None]:
    """By Python, as by any program that installs a handler after the first load."""
    before = signal.signal(signal.SIGBUS, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGBUS, before)


def test_where_somebody_else_handles_bus_errors_files_are_read(file: Path) -> None:
    script = """
    import resource, signal, sys
    import torch, weightload
    from memory.test_copies_past_caches import *
    file = Path(sys.argv[1])
    target = touched()
    weightload.load_into(target, file)
    with bus_errors_handled():
        target = touched()
        assert in_read_calls(lambda: weightload.load_into(target, file)) > 0.9 * file.stat().st_size
        check(target, file)
    """
    done = run_script(script, file, cwd=TESTS)
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_cut_off_meanwhile_is_an_error(tmp_path: Path) -> None:
    """By another process, between the opening of its header and the copies: never a SIGBUS."""
    path = tmp_path / "m.safetensors"
    script = """
    import os, sys, threading
    import torch, weightload
    from memory.test_copies_past_caches import *
    path = Path(sys.argv[1])
    failed = 0
    for attempt in range(60):
        write_tensors(path, [("a", "I16", [16 << 20])])
        path.read_bytes()
        target = {"a": torch.full([16 << 20], 7, dtype=torch.int16)}
        go = threading.Barrier(2)

        def cut():
            go.wait()
            for _ in range(attempt * 3000):
                pass
            os.truncate(path, 1 << 20)

        thread = threading.Thread(target=cut)
        thread.start()
        go.wait()
        try:
            weightload.load_into(target, path)
        except (weightload.ReadError, weightload.HeaderError) as error:
            assert "m.safetensors" in str(error)
            failed += 1
        thread.join()
    assert failed, "never in time"
    """
    done = run_script(script, path, cwd=TESTS)
    assert done.returncode == 0, done.stderr


def test_mappings_of_a_load_are_gone_after_it(file: Path) -> None:
    target = touched()
    weightload.load_into(target, file)
    assert file.name not in Path("/proc/self/maps").read_text()


def test_who_reads_what_on_a_node() -> None:
    now = settings.current()
    assert [now.read_mode(readers) for readers in ("one", "same", "apart")] == ["auto", "buffered", "uncached"]
    with settings.override(read="direct"):
        assert settings.current().read_mode("same") == "direct"
    with settings.override(read="buffered"):
        assert settings.current().read_mode("apart") == "buffered"
    assert readers_of(shared=False, apart=False) == "one"


@pytest.mark.parametrize(
    ("mesh", "placements", "on_node", "past_cache"),
    [
        ((2,), [Shard(0)], 2, True),  # nobody else's
        ((2,), [Replicate()], 2, False),  # the other rank finds it in the page cache
        ((2, 2), [Replicate(), Shard(0)], 4, False),
        ((2, 2), [Replicate(), Shard(0)], 2, True),  # the replica is on another node
        ((2, 2), [Shard(0), Replicate()], 2, False),
    ],
    ids=str,
)
def test_what_no_other_rank_of_the_node_reads_is_read_past_the_page_cache(
    mesh: tuple[int, ...],
    placements: list[Any],
    on_node: int,
    past_cache: bool,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not on_a_local_disk(file):
        pytest.skip("what is not on a disk is never read past the page cache")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
    whole = copied(file)
    with rank_of(mesh, 0) as made:
        assert readers_of(shared=False, apart=True) == "apart"
        assert ranks_of_this_node() == on_node
        target = {
            name: empty_like(distribute_tensor(whole[name], made, placements, src_data_rank=None)) for name in whole
        }
        expected = {name: distribute_tensor(whole[name], made, placements, src_data_rank=None) for name in whole}
        del whole
        for cold in (True, False):
            if cold:
                evict([file])
            else:
                file.read_bytes()
            report = weightload.load_into(target, file, strategy="independent")
            stats = report.stats["cpu"]
            for name, tensor in target.items():
                assert torch.equal(tensor.to_local(), expected[name].to_local()), name
            # Small and scattered pieces are not worth it.
            assert (stats.direct_bytes > 0.9 * stats.wanted_bytes) == (past_cache and cold), (cold, stats)


def test_nobody_is_asked_for_the_ranks_of_a_node_where_no_group_is_left(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copied(file)["rows"]
    with rank_of((2,), 1) as mesh:
        expected = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        target = {"rows": empty_like(expected)}
    for ranks in ("2", "0"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        target["rows"].to_local().zero_()
        weightload.load_into(target, file, strict=False)
        assert torch.equal(target["rows"].to_local(), expected.to_local())


def test_forked_children_keep_the_guard(file: Path) -> None:
    script = """
    import os, sys
    import torch, weightload
    from memory.test_copies_past_caches import *
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    weightload.load_into(touched(), file)
    child = os.fork()
    if child == 0:
        target = touched()
        read = in_read_calls(lambda: weightload.load_into(target, file))
        check(target, file)
        os._exit(0 if NOT_HERE or read < 1 << 20 else 5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    done = run_script(script, file, cwd=TESTS)
    assert done.returncode == 0, done.stderr


def test_a_bus_error_of_the_program_still_ends_it(file: Path) -> None:
    script = """
    import mmap, os, sys, tempfile
    import torch, weightload
    from memory.test_copies_past_caches import *
    weightload.load_into(touched(), Path(sys.argv[1]))
    with tempfile.TemporaryFile() as other:
        other.truncate(8192)
        memory = mmap.mmap(other.fileno(), 8192)
        other.truncate(0)
        memory[5000]
    """
    done = run_script(script, file, cwd=TESTS)
    assert done.returncode == -signal.SIGBUS, (done.returncode, done.stderr)
