"""safetensors_weights_iterator: stopping, sharing, choosing, and what a load holds."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS, evict, open_checkpoints, run_script, start, thread_count, write_tensors

import weightload
from weightload import _C, errors, settings


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_joins_threads_and_closes_files(shards: list[Path], backend: str) -> None:
    threads = thread_count()
    weights = start(shards, backend)
    kept = list(weights)
    assert len(kept) == len(weights) == 120
    assert thread_count() == threads
    assert open_checkpoints() == []
    assert list(weights) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taken", [0, 1, 50])
@pytest.mark.parametrize("how", ["close", "with", "collect"])
def test_leaving_early_joins_threads_and_closes_files(shards: list[Path], backend: str, taken: int, how: str) -> None:
    evict(shards)
    threads = thread_count()
    weights = start(shards, backend)
    kept = [next(weights) for _ in range(taken)]
    if how == "close":
        weights.close()
        weights.close()
        assert list(weights) == []
    elif how == "with":
        with pytest.raises(ZeroDivisionError), weights:
            raise ZeroDivisionError
    else:
        del weights
        gc.collect()
    assert thread_count() == threads
    assert open_checkpoints() == []
    reference = weightload.load_file(shards[0])
    assert all(torch.equal(t.view(torch.int32), reference[n].view(torch.int32)) for n, t in kept if n in reference)


def test_an_exception_in_the_consumers_loop(shards: list[Path]) -> None:
    def consume() -> None:
        for number, _ in enumerate(start(shards, "pread")):
            if number == 3:
                raise KeyError("consumer")

    threads = thread_count()
    with pytest.raises(KeyError, match="consumer"):
        consume()
    gc.collect()
    assert thread_count() == threads


@pytest.mark.parametrize("option", ["names", "shard", "rename"])
def test_an_error_of_the_callers_function_keeps_no_file_open(shards: list[Path], option: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    options: Any = {option: fail}
    with pytest.raises(ZeroDivisionError) as raised:
        weightload.safetensors_weights_iterator(shards, to_cpu=True, **options)
    assert open_checkpoints() == []
    del raised


def test_ctrl_c_while_the_bar_is_drawn_ends_the_load(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    weights: Any = weightload.safetensors_weights_iterator(shards, to_cpu=True, show_progress=True)

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    next(weights)
    monkeypatch.setattr(weights._bar, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(weights)
    assert list(weights) == []  # or the tensor that was on its way would be missing
    assert open_checkpoints() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_iterators_at_once(shards: list[Path], backend: str) -> None:
    reference = {name: tensor for file in shards for name, tensor in weightload.load_file(file).items()}
    for (first, a), (second, b) in zip(start(shards, backend), start(shards, backend), strict=True):
        assert first == second
        assert a.data_ptr() != b.data_ptr()
        assert torch.equal(a.view(torch.int32), reference[first].view(torch.int32))
        assert torch.equal(b.view(torch.int32), reference[first].view(torch.int32))


def test_one_iterator_in_many_threads(shards: list[Path]) -> None:
    weights = start(shards, "pread")
    taken: list[str] = []
    workers = [threading.Thread(target=lambda: taken.extend(name for name, _ in weights)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == sorted(f"{f}.{i}" for f in range(3) for i in range(40))


def test_close_from_another_thread_ends_a_wait(shards: list[Path], arm: Callable[..., None]) -> None:
    weights = start(shards, "pread")
    arm("delay", count=10**6, delay_ms=5)
    seen: list[int] = []
    consumer = threading.Thread(target=lambda: seen.append(len(list(weights))))
    consumer.start()
    weights.close()
    consumer.join(timeout=60)
    assert not consumer.is_alive()
    assert seen[0] <= 120


def test_names_by_collection_and_predicate(shards: list[Path]) -> None:
    wanted = {"0.3", "2.39", "absent"}
    assert [name for name, _ in start(shards, names=wanted)] == ["0.3", "2.39"]
    assert [name for name, _ in start(shards, names=lambda name: name.endswith(".7"))] == [
        "0.7",
        "1.7",
        "2.7",
    ]
    assert start(shards, names=wanted).total_bytes == 2 * 4 * 65_536
    assert list(start(shards, names=[])) == []
    assert [name for name, _ in start(shards, names=iter(["0.3", "2.39"]))] == ["0.3", "2.39"]
    with pytest.raises(TypeError, match="not one string"):
        start(shards, names="0.3")
    for wrong in (5, [["a"]], b"0.3", [b"0.3"], [3], torch.zeros(2)):
        with pytest.raises(TypeError, match="names must be a collection of tensor names or a predicate"):
            start(shards, names=wrong)
    assert list(start(shards, names=["of no file"])) == []  # a filter


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_that_nobody_wants_are_not_read(tmp_path: Path, backend: str) -> None:
    path = write_tensors(
        tmp_path / "big.safetensors", [("a", "U8", [64 << 20]), ("b", "U8", [4096]), ("c", "U8", [64 << 20])]
    )
    evict([path])
    if _C.resident_bytes(os.fsencode(path)) is None:
        pytest.skip("the kernel does not tell what is cached")
    assert [name for name, _ in start([path], backend, names=["b"])] == ["b"]
    assert _C.resident_bytes(os.fsencode(path)) < 32 << 20  # type: ignore[operator]  # the kernel's readahead at most


def test_a_consumer_that_leaves_bounds_the_reading(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "long.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(128)])
    evict([path])
    if _C.resident_bytes(os.fsencode(path)) is None:
        pytest.skip("the kernel does not tell what is cached")
    with settings.override(window_bytes=4 << 20, task_bytes=1 << 20), start([path], "pread") as weights:
        next(weights)
    assert _C.resident_bytes(os.fsencode(path)) < 64 << 20  # type: ignore[operator]


def test_what_is_written_to_a_mapped_tensor_stays_while_its_neighbour_is_read(
    tmp_path: Path, arm: Callable[..., None]
) -> None:
    # The second tensor is misaligned, so it is read into private memory, by way of the page cache; its first page is
    # the mapped tensor's last one.
    path = write_tensors(tmp_path / "n.safetensors", [("mapped", "U8", [(3 << 20) + 1]), ("read", "F32", [12 << 20])])
    evict([path])
    arm("delay", first=0, count=10**6, delay_ms=30)  # the neighbour is read after the writing
    with settings.override(task_bytes=64 << 20, threads=1):
        weights = start([path])
        mapped = next(weights)[1]
        mapped.fill_(7)
        read = next(weights)[1]
    assert bool((mapped == 7).all())
    assert bytes(read.view(torch.uint8).numpy()) == path.read_bytes()[-(48 << 20) :]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "1.safetensors", [("same", "U8", [1])])
    second = write_tensors(tmp_path / "2.safetensors", [("other", "U8", [1]), ("same", "U8", [1])])
    with pytest.raises(errors.DuplicateTensor) as caught:
        start([first, second])
    assert (caught.value.tensor, caught.value.filename) == ("same", str(second))
    assert len(list(start([first, second], names=["other"]))) == 1


def test_many_loads_leave_nothing(shards: list[Path]) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    list(start(shards))
    before = descriptors()
    for number in range(100):
        weights = start(shards, BACKENDS[number % 2])
        for _ in range(number % 7):
            next(weights)
        weights.close()
    assert descriptors() == before


def test_private_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """200 MB pass through; what is held is the window and the blocks it spans."""
    path = write_tensors(tmp_path / "much.safetensors", [(f"{i}", "U8", [4 << 20]) for i in range(50)])
    script = """
        import sys, weightload
        from weightload import settings
        def anonymous():
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
        for backend in ("mmap", "pread"):
            with settings.override(window_bytes=16 << 20, block_bytes=16 << 20):
                weights = weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, backend=backend)
            before, most = anonymous(), 0
            for _, tensor in weights:
                tensor.sum()
                del tensor, _
                most = max(most, anonymous() - before)
            limit = (16 << 20) if backend == "mmap" else (16 << 20) + 3 * (16 << 20)
            assert most < limit, (backend, most)
    """
    done = run_script(script, path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["/dev/shm", "/tmp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_file_systems(folder: str, backend: str) -> None:
    """Memory file systems answer the kernel's questions differently from disks."""
    if not os.access(folder, os.W_OK):
        pytest.skip(f"no {folder} here")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = write_tensors(Path(place) / "m.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(20)])
        data = path.read_bytes()[-(20 << 20) :]
        joined = torch.cat([tensor for _, tensor in start([path], backend)])
        assert bytes(joined.numpy()) == data


def test_private_memory_does_without_a_mapping(tmp_path: Path) -> None:
    """The address space left is too small to map the file, and large enough for a window of it."""
    path = write_tensors(tmp_path / "big.safetensors", [(f"{i}", "U8", [4 << 20]) for i in range(100)])
    script = """
        import resource, sys, weightload
        from weightload import settings
        with settings.override(window_bytes=8 << 20, block_bytes=4 << 20):
            list(weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, names=["0"], backend="pread"))
            used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
            count = sum(1 for _ in weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, backend="pread"))
            assert count == 100, count
            try:
                weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True)
            except MemoryError as error:
                assert isinstance(error, weightload.WeightLoadError), error
                assert "cannot map" in str(error), error
            else:
                raise AssertionError("a mapping of 400 MB fitted into 300 MB")
    """
    done = run_script(script, path)
    assert done.returncode == 0, done.stderr


def test_bad_arguments_are_refused(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match="backend"):
        start(shards, "mystery")
    with pytest.raises(ValueError, match="strategy"):
        weightload.safetensors_weights_iterator(shards, strategy="mystery")
    with pytest.raises(ValueError, match="contradicts"):
        weightload.safetensors_weights_iterator(shards, to_cpu=True, device="cuda")
    for device in ("xla", "meta", torch.device("meta"), "hpu:7"):
        with pytest.raises(ValueError, match="cannot load to"):
            weightload.safetensors_weights_iterator(shards, device=device)
        with pytest.raises(ValueError, match="cannot load to"):
            weightload.load_file(shards[0], device=device)


def test_the_fastvideo_call(shards: list[Path]) -> None:
    """Its four arguments by position, on one process without an accelerator."""
    if torch.accelerator.is_available():
        pytest.skip("the default device is an accelerator here")
    for arguments in [(), (True,), (False, True), (False, False), (False, True, True), (True, True, True)]:
        assert len(dict(weightload.safetensors_weights_iterator([str(s) for s in shards], *arguments))) == 120
    assert len(dict(weightload.safetensors_weights_iterator(shards[0]))) == 40


def test_a_missing_file_among_others(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        start([shards[0], tmp_path / "none.safetensors", shards[1]])
    assert caught.value.filename == str(tmp_path / "none.safetensors")
