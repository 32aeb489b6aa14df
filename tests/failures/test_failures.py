"""Failures during a load: I/O errors, files that shrink, fork, exit and signals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS, evict, interrupted_after, run_script, start, write_tensors

import weightload
from weightload import _C, errors, settings
from weightload._checkpoint.selection import open_files
from weightload._load.devices import CPU
from weightload._load.start import Reading, Source
from weightload._load.start import start as start_load


def test_a_signal_handler_may_close_the_iterator_it_interrupts(shards: list[Path], arm: Callable[..., None]) -> None:
    arm("delay", first=len(shards), count=10**6, delay_ms=300)  # nine seconds in all, were it not closed
    with settings.override(task_bytes=1 << 20, threads=1):
        weights = start(shards, "pread")
    with interrupted_after(0.01, lambda *_: weights.close()):
        assert len(list(weights)) < 120


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_is_felt_while_headers_are_opened(tmp_path: Path, arm: Callable[..., None], threads: int) -> None:
    paths = [write_tensors(tmp_path / f"{i}.safetensors", [(f"{i}", "U8", [1])]) for i in range(40)]
    arm("delay", count=10**6, delay_ms=100)
    with settings.override(threads=threads), interrupted_after(0.01), pytest.raises(KeyboardInterrupt):
        start(paths, "mmap")
    assert _C.reads_since_armed() < len(paths)


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
    with settings.override(task_bytes=1 << 20, threads=1), pytest.raises(errors.ReadError):
        names.extend(name for name, _ in start_load(Source.of(files), CPU, reading=Reading("pread")))
    assert names == [str(i) for i in range(9)]  # ten tasks of 1 MiB, shifted by the header, hold nine tensors


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


def test_a_child_that_is_forked_while_a_thread_waits_is_told_so(shards: list[Path]) -> None:
    script = """
        import os, signal, sys, threading, weightload
        from weightload import _C
        _C.arm_fault("delay", count=1, delay_ms=3_000)
        weights = weightload.safetensors_weights_iterator(sys.argv[1:], to_cpu=True, backend="pread")
        thread = threading.Thread(target=lambda: list(weights))
        thread.start()
        thread.join(0.5)  # until it waits
        for _ in range(5):
            if not thread.is_alive():
                break  # a busy machine
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                try:
                    next(weights)
                except weightload.WeightLoadError as error:
                    os._exit(0 if "begun before fork" in str(error) else 4)
                os._exit(3)
            status = os.waitpid(child, 0)[1]
            assert status == 0 or not thread.is_alive(), status
        thread.join()
    """
    done = run_script(script, *shards)
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
        while True:  # until the signal comes
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
