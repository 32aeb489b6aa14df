"""Failures on the way to an accelerator: memory, page-locking, I/O errors, leaving, fork, exit."""

from __future__ import annotations

import errno
import gc
import os
import signal
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TESTS, evict, run_script, thread_count, write_tensors
from support.simulated import DEVICE, KIND, SMALL, assert_same, load, raw, reference_of

import weightload
from weightload import _C, errors, settings

pytestmark = pytest.mark.simulated

# A process that has the simulated accelerator; the script under test follows.
PROLOGUE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from support import simulated
import torch, weightload
from weightload import settings
native = simulated.native()
"""


def run_simulated(script: str, *arguments: object) -> Any:
    return run_script(PROLOGUE + textwrap.dedent(script), TESTS, *arguments)


@pytest.mark.parametrize("limit", [0, 300_000, 1_500_000])
def test_out_of_memory_names_the_tensor_frees_everything_and_less_works(
    simulated: Any, mixed: list[Path], limit: int
) -> None:
    simulated.limit_device_memory(limit)
    with settings.override(**SMALL):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            dict(load(*mixed))
        assert isinstance(caught.value, weightload.WeightLoadError)
        assert isinstance(caught.value, MemoryError)
        assert caught.value.tensor in reference_of(*mixed)
        assert caught.value.tensor in str(caught.value)
        assert caught.value.filename in [str(path) for path in mixed]
        del caught
        gc.collect()
        assert (simulated.live_bytes(0), simulated.pinned_bytes()) == (0, 0)
        simulated.limit_device_memory(1 << 30)
        assert_same(dict(load(*mixed)), *mixed)


def test_tensors_that_were_yielded_survive_running_out_of_memory(simulated: Any, mixed: list[Path]) -> None:
    reference = reference_of(*mixed)
    simulated.limit_device_memory(1_500_000)
    kept = {}
    with settings.override(**SMALL), pytest.raises(errors.DeviceOutOfMemoryError):
        for name, tensor in load(*mixed):
            kept[name] = tensor
    assert kept
    for name, tensor in kept.items():
        assert torch.equal(raw(tensor), raw(reference[name])), name
    kept.clear()
    del tensor


def test_load_file_and_load_say_so_too(simulated: Any, real_checkpoint: Path) -> None:
    simulated.limit_device_memory(1 << 20)
    with pytest.raises(errors.DeviceOutOfMemoryError, match="out of memory"):
        weightload.load_file(real_checkpoint, DEVICE)
    with pytest.raises(errors.DeviceOutOfMemoryError, match="out of memory"):
        weightload.load(real_checkpoint.read_bytes(), device=DEVICE)


def test_pinned_memory_counts_as_torch_rounds_it(simulated: Any, mixed: list[Path]) -> None:
    """Slots of 12 KiB lock 16."""
    with settings.override(slot_bytes=12 << 10, pinned_bytes=64 << 10):
        weights = load(*mixed)
        assert_same(dict(weights), *mixed)
    assert weights.stats().device.slots <= 4


@pytest.mark.parametrize("pinned", [1, 2, 3])
def test_a_smaller_ring_when_page_locking_fails(simulated: Any, mixed: list[Path], pinned: int) -> None:
    simulated.fail_pinned_after(pinned)
    with settings.override(**SMALL), warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = load(*mixed)
        assert_same(dict(weights), *mixed)
    assert (weights.stats().device.slots, weights.stats().device.pageable_slots) == (pinned, 0)


def test_pageable_memory_with_one_warning_when_there_is_no_other(simulated: Any, mixed: list[Path]) -> None:
    simulated.fail_pinned_after(0)
    with settings.override(**SMALL), pytest.warns(RuntimeWarning, match="page-lock") as caught:
        weights = load(*mixed)
        assert_same(dict(weights), *mixed)
    assert len(caught) == 1
    assert weights.stats().device.pageable_slots == weights.stats().device.slots > 0


@pytest.mark.parametrize("read", ["buffered", "direct"])
@pytest.mark.parametrize("first", [6, 9, 20, 45])
def test_an_io_error_reaches_the_consumer_before_any_tensor_that_needed_it(
    simulated: Any, mixed: list[Path], arm: Callable[..., None], read: str, first: int
) -> None:
    reference = reference_of(*mixed)
    evict(mixed)
    kept = {}
    with settings.override(read=read, **SMALL):
        arm("error", first=first, count=10**6, error_number=errno.EIO)
        with pytest.raises(errors.ReadError) as caught:
            for name, tensor in load(*mixed):
                kept[name] = tensor
        _C.disarm_fault()
    assert caught.value.errno == errno.EIO
    assert caught.value.offset is not None
    assert caught.value.tensor in reference
    assert caught.value.tensor not in kept
    assert caught.value.filename in [str(path) for path in mixed]
    for name, tensor in kept.items():
        assert torch.equal(raw(tensor), raw(reference[name])), name
    kept.clear()
    tensor = None
    del caught
    assert_same(dict(load(*mixed)), *mixed)  # the process can load again


@pytest.mark.parametrize("fault", ["short_read", "interrupt"])
@pytest.mark.parametrize("read", ["buffered", "direct"])
def test_short_reads_and_interrupts_are_continued(
    simulated: Any, mixed: list[Path], arm: Callable[..., None], fault: str, read: str
) -> None:
    with settings.override(read=read, **SMALL):
        arm(fault, first=3, count=500)
        assert_same(dict(load(*mixed)), *mixed)


def test_a_file_that_shrinks_is_an_error_not_a_crash(simulated: Any, tmp_path: Path) -> None:
    for read in settings.READ_MODES:
        path = write_tensors(tmp_path / f"{read}.safetensors", [(f"{i}", "F32", [65_536]) for i in range(40)])
        with settings.override(read=read, **SMALL):
            weights = load(path)
            next(weights)
            os.truncate(path, 3_000_000)
            with pytest.raises(errors.ReadError, match=r"ended|changed while it was read"):
                list(weights)


def test_a_header_error_starts_nothing(simulated: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json")
    with pytest.raises(errors.HeaderError):
        load(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.safetensors")


def test_a_dtype_that_torch_lacks_is_an_error_at_its_tensor(simulated: Any, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "f6.safetensors", [("a", "F32", [4]), ("b", "F6_E2M3", [4])])
    weights = load(path)
    assert next(weights)[0] == "a"
    with pytest.raises(errors.TensorError, match="F6_E2M3"):
        next(weights)


def test_leaving_the_loop_stops_the_threads(simulated: Any, shards: list[Path]) -> None:
    with settings.override(**SMALL):
        for taken, _ in enumerate(load(*shards)):
            if taken == 3:
                break
        gc.collect()
        assert thread_count() == 0
        assert simulated.pinned_bytes() == 0
        with load(*shards) as weights:
            next(weights)
        assert thread_count() == 0
        with pytest.raises(StopIteration):
            next(weights)
    with pytest.raises(ZeroDivisionError):
        for _ in load(*shards):
            raise ZeroDivisionError
    gc.collect()
    assert thread_count() == 0


def test_a_hundred_loads_leave_nothing(simulated: Any, all_dtypes: Path) -> None:
    load_one = lambda: dict(load(all_dtypes))  # noqa: E731
    load_one()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        load_one()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert (simulated.live_bytes(0), simulated.pinned_bytes(), thread_count()) == (0, 0, 0)


def test_a_load_begun_before_fork_is_an_error_in_the_child(simulated: Any, shards: list[Path]) -> None:
    with settings.override(**SMALL):
        weights = load(*shards)
    next(weights)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            next(weights)
        except weightload.WeightLoadError as error:
            code = 0 if "fork" in str(error) else 2
        for device in (DEVICE, KIND, 0, None):
            try:
                load(*shards, device=device)
            except weightload.WeightLoadError as error:
                code += 0 if "spawn" in str(error) else 4
            else:
                code += 8
        del weights
        gc.collect()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(dict(weights)) == 119


def test_the_interpreter_may_exit_in_the_middle(shards: list[Path]) -> None:
    script = """
    with settings.override(slot_bytes=65536, pinned_bytes=262144, device_block_bytes=262144):
        weights = weightload.safetensors_weights_iterator(sys.argv[2:], device=simulated.DEVICE)
    kept = next(weights)
    print("leaving")
    """
    run = run_simulated(script, *shards)
    assert (run.returncode, run.stdout, run.stderr) == (0, "leaving\n", "")


def test_ctrl_c_is_felt_while_the_device_is_stuck(shards: list[Path]) -> None:
    script = """
    import signal, threading
    gates = [native.hold_stream(0, stream) for stream in (0, *native.side_streams(0))]
    with settings.override(slot_bytes=65536, pinned_bytes=262144, device_block_bytes=262144):
        weights = weightload.safetensors_weights_iterator(sys.argv[2:], device=simulated.DEVICE)
    def release():
        for gate in gates:
            gate()
    def interrupt(*_):
        threading.Thread(target=release).start()  # a thread that waits for the device can be joined only then
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        list(weights)
    except KeyboardInterrupt:
        print("felt")
    """
    run = run_simulated(script, *shards)
    assert (run.returncode, run.stdout, run.stderr) == (0, "felt\n", "")


def test_the_host_cannot_touch_the_memory_of_the_device(real_checkpoint: Path) -> None:
    """The simulation catches a host that reads device memory."""
    script = """
    import ctypes
    tensor = torch.arange(100).to(simulated.DEVICE)
    assert tensor.cpu()[7] == 7
    ctypes.string_at(tensor.data_ptr(), 1)
    """
    assert run_simulated(script, real_checkpoint).returncode == -signal.SIGSEGV
