"""safetensors_weights_iterator: stopping, sharing, forking, failing, choosing."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import open_checkpoints, thread_count, write_tensors

import weightload
from weightload import _C, errors, settings
from weightload.iterator import WeightIterator, open_files

BACKENDS = ["mmap", "pread"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [
        write_tensors(folder / f"{f}.safetensors", [(f"{f}.{i}", "F32", [65_536]) for i in range(40)], seed=f)
        for f in range(3)
    ]


def start(files: list[Path], backend: str = "mmap", **options: object) -> WeightIterator:
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend=backend, **options)  # type: ignore[arg-type]
    assert isinstance(weights, WeightIterator)
    return weights


def evict(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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


def test_a_signal_handler_may_close_the_iterator_it_interrupts(shards: list[Path], arm: Callable[..., None]) -> None:
    arm("delay", count=10**6, delay_ms=100)  # three seconds in all, were it not closed
    with settings.override(task_bytes=1 << 20, threads=1):
        weights = start(shards, "pread")
    previous = signal.signal(signal.SIGALRM, lambda *_: weights.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert len(list(weights)) < 120
    finally:
        signal.signal(signal.SIGALRM, previous)


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
    with pytest.raises(TypeError, match="not one string"):
        start(shards, names="0.3")


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


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "1.safetensors", [("same", "U8", [1])])
    second = write_tensors(tmp_path / "2.safetensors", [("other", "U8", [1]), ("same", "U8", [1])])
    with pytest.raises(errors.DuplicateTensor) as caught:
        start([first, second])
    assert (caught.value.tensor, caught.value.filename) == ("same", str(second))
    assert len(list(start([first, second], names=["other"]))) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", range(0, 30, 3))
def test_an_io_error_reaches_the_consumer_with_its_place(
    shards: list[Path], arm: Callable[..., None], backend: str, first: int
) -> None:
    evict(shards)
    with settings.override(task_bytes=1 << 20):
        arm("error", first=first, count=10**6, error_number=errno.EIO)
        with pytest.raises(errors.ReadError) as caught:
            list(start(shards, backend))
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EIO
    if first >= 6:  # before, it may be a header that could not be read
        assert caught.value.offset is not None
        assert caught.value.tensor is not None
        assert caught.value.tensor in str(caught.value)
    assert str(caught.value.filename) in [str(file) for file in shards]
    _C.disarm_fault()
    assert len(list(start(shards, backend))) == 120  # the process can load again


@pytest.mark.parametrize("fault", ["short_read", "interrupt"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_short_reads_and_interrupts_are_continued(
    shards: list[Path], arm: Callable[..., None], backend: str, fault: str
) -> None:
    reference = weightload.load_file(shards[0])
    evict(shards)
    arm(fault, count=50)
    for name, tensor in start(shards[:1], backend):
        assert torch.equal(tensor.view(torch.int32), reference[name].view(torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path, backend: str) -> None:
    path = write_tensors(tmp_path / "s.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(64)])
    evict([path])
    with settings.override(window_bytes=4096, task_bytes=1 << 20, threads=1):
        weights = start([path], backend)
    next(weights)
    os.truncate(path, 20 << 20)
    with pytest.raises(errors.ReadError) as caught:
        for _ in weights:
            pass
    assert caught.value.filename == str(path)
    weights.close()


def test_what_was_read_before_an_error_is_delivered(tmp_path: Path, arm: Callable[..., None]) -> None:
    path = write_tensors(tmp_path / "p.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(32)])
    files = open_files([path])
    arm("error", first=10, count=10**6, error_number=errno.EIO)
    names = []
    with settings.override(task_bytes=1 << 20, threads=2), pytest.raises(errors.ReadError):
        names.extend(name for name, _ in WeightIterator(files, None, backend="pread", read_ahead=True))
    assert names == [str(i) for i in range(9)]  # ten tasks of 1 MiB, shifted by the header, hold nine tensors


def run_script(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_child_gets_an_error_and_ends_cleanly(shards: list[Path], backend: str) -> None:
    script = """
        import os, sys, weightload
        weights = weightload.safetensors_weights_iterator(sys.argv[2:], to_cpu=True, backend=sys.argv[1])
        first = next(weights)[1]
        child = os.fork()
        if child == 0:
            try:
                next(weights)
            except weightload.WeightLoadError as error:
                assert "fork" in str(error), error
                total = first.double().nansum().item()      # what was yielded stays valid
                weights.close()
                again = dict(weightload.safetensors_weights_iterator(sys.argv[2:], to_cpu=True, backend=sys.argv[1]))
                sys.exit(0 if len(again) == 120 else 4)   # a load of the child's own works
            sys.exit(3)
        status = os.waitpid(child, 0)[1]
        rest = len(list(weights))                            # the parent's load goes on
        sys.exit(0 if status == 0 and rest == 119 else 5)
    """
    done = run_script(script, backend, *shards)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["end", "exit", "exception"])
def test_interpreter_exit_with_a_live_iterator(shards: list[Path], backend: str, how: str) -> None:
    script = """
        import sys, weightload
        weights = weightload.safetensors_weights_iterator(sys.argv[3:], to_cpu=True, backend=sys.argv[1])
        cycle = [weights]; cycle.append(cycle)
        kept = next(weights)
        if sys.argv[2] == "exit": sys.exit(7)
        if sys.argv[2] == "exception": raise RuntimeError("consumer")
    """
    done = run_script(script, backend, how, *shards)
    assert done.returncode == {"end": 0, "exit": 7, "exception": 1}[how], done.stderr
    assert ("RuntimeError: consumer" in done.stderr) == (how == "exception")


def test_ctrl_c_ends_a_wait(shards: list[Path]) -> None:
    script = """
        import sys, weightload
        from weightload import _C
        weights = weightload.safetensors_weights_iterator(sys.argv[1:], to_cpu=True, backend="pread")
        _C.arm_fault("delay", count=10**6, delay_ms=300)
        print("ready", flush=True)
        for _ in weightload.safetensors_weights_iterator(sys.argv[1:], to_cpu=True, backend="pread"):
            pass
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, shards)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT or "KeyboardInterrupt" in stderr


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
    """600 MB pass through; what is held is the window and the blocks it spans."""
    path = write_tensors(tmp_path / "much.safetensors", [(f"{i}", "U8", [4 << 20]) for i in range(150)])
    script = """
        import sys, weightload
        from weightload import settings
        def anonymous():
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
        for backend in ("mmap", "pread"):
            with settings.override(window_bytes=64 << 20):
                weights = weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, backend=backend)
            before, most = anonymous(), 0
            for _, tensor in weights:
                tensor.sum()
                del tensor, _
                most = max(most, anonymous() - before)
            limit = (16 << 20) if backend == "mmap" else (64 << 20) + 3 * (64 << 20)
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
    for device in ("cuda", "cuda:1", torch.device("meta")):
        with pytest.raises(NotImplementedError, match="only the CPU"):
            weightload.safetensors_weights_iterator(shards, device=device)
        with pytest.raises(NotImplementedError, match="only the CPU"):
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
