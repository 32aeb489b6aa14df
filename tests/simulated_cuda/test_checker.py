"""The simulated CUDA by itself: it finds what is wrong, and only that."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import SEED, run_script

from simulated_cuda import native as simulated_cuda

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def cuda() -> Iterator[Any]:
    found = simulated_cuda.load()
    found.seed_delays(SEED)
    yield found
    gc.collect()
    torch.cuda.synchronize()
    found.empty_cache()


def filled(value: int) -> torch.Tensor:
    tensor = torch.full((SIZE,), value, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    return tensor


def one_report(*words: str) -> None:
    (report,) = simulated_cuda.take_reports()
    torch.cuda.synchronize()  # what comes now, giving the memory back, is ordered
    for word in words:
        assert word in report, report


@pytest.mark.parametrize("ordered", [False, True])
def test_a_write_on_another_stream_needs_an_event(ordered: bool) -> None:
    tensor, other = filled(1), filled(2)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor.copy_(other)
    if ordered:
        torch.cuda.current_stream().wait_stream(side)
    kept = tensor.clone()
    if ordered:
        assert simulated_cuda.take_reports() == []
        assert bool((kept.cpu() == 2).all())
    else:
        one_report("race: copy on devices", "reads", "writes", "stream", "nothing orders the two")


def test_two_reads_need_none() -> None:
    tensor = filled(1)
    with torch.cuda.stream(torch.cuda.Stream()):
        first = tensor.clone()
        first.record_stream(torch.cuda.default_stream())
    tensor.clone()
    torch.cuda.synchronize()
    assert simulated_cuda.take_reports() == []


def test_a_race_is_reported_although_the_bytes_came_out_right(cuda: Any) -> None:
    cuda.seed_delays(SEED, longest_us=0)
    tensor, other = filled(1), filled(2)
    with torch.cuda.stream(torch.cuda.Stream()):
        tensor.copy_(other)
    torch.cuda._sleep(100_000_000)
    assert bool((tensor.clone().cpu() == 2).all())
    one_report("race")


@pytest.mark.parametrize("way", ["event", "query", "stream", "device"])
def test_the_host_orders_by_waiting(way: str) -> None:
    tensor, other = filled(1), filled(2)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor.copy_(other)
        event = torch.cuda.Event()
        event.record()
    if way == "event":
        event.synchronize()
    elif way == "query":
        while not event.query():
            pass
    elif way == "stream":
        side.synchronize()
    else:
        torch.cuda.synchronize()
    assert bool((tensor.cpu() == 2).all())
    assert simulated_cuda.take_reports() == []


def test_an_event_covers_what_was_queued_before_it(cuda: Any) -> None:
    tensor, other = filled(1), filled(2)
    side = torch.cuda.Stream()
    event = torch.cuda.Event()
    with torch.cuda.stream(side):
        event.record()
        tensor.copy_(other)
    event.wait()
    tensor.clone()
    one_report("race")


def test_a_source_must_stay_until_it_was_copied(cuda: Any) -> None:
    source = torch.full((SIZE,), 7, dtype=torch.uint8).pin_memory()
    target = filled(0)
    gate = cuda.hold_stream(0, 0)
    target.copy_(source, non_blocking=True)
    source[123] = 8
    gate()
    torch.cuda.synchronize()
    one_report("changed: page-locked memory")


def test_what_is_copied_to_the_host_is_poison_until_it_is_there(cuda: Any) -> None:
    source = filled(7)
    target = torch.full((SIZE,), 7, dtype=torch.uint8).pin_memory()
    gate = cuda.hold_stream(0, 0)
    target.copy_(source, non_blocking=True)
    assert bool((target == 0xA5).all())
    gate()
    torch.cuda.synchronize()
    assert bool((target == 7).all())


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_must_not_go_to_the_next_while_another_stream_uses_it(recorded: bool) -> None:
    tensor = filled(1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        kept = tensor.clone()
    if recorded:
        tensor.record_stream(side)
    del tensor
    torch.cuda.synchronize()
    reports = simulated_cuda.take_reports()
    assert len(reports) == (0 if recorded else 1)
    if not recorded:
        assert "poison of memory given back" in reports[0]
    del kept


def test_fresh_and_reused_memory_is_poisoned() -> None:
    for _ in range(2):
        tensor = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
        assert bool((tensor.cpu() == 0xCD).all())
        pinned = torch.empty(SIZE, dtype=torch.uint8, pin_memory=True)
        assert bool((pinned == 0xEE).all())
        tensor.fill_(1)
        pinned.fill_(1)
        del tensor, pinned


def test_the_host_cannot_touch_the_memory_of_the_device() -> None:
    done = run_script(
        """
        import ctypes, torch
        tensor = torch.arange(100, device="cuda")
        assert tensor.cpu()[7] == 7
        ctypes.string_at(tensor.data_ptr(), 1)
        """
    )
    assert done.returncode == -11, done.stderr


def test_what_is_not_provided_fails_with_its_name() -> None:
    script = """
    import torch
    from simulated_cuda import native
    library = native.runtime()
    assert library.cudaMallocManaged(0, 0, 0) == 801
    print(library.cudaGetLastError())
    """
    done = run_script("import sys; sys.path.insert(0, 'tests')\nimport torch\ntorch.cuda.init()\n" + _dedent(script))
    assert (done.returncode, done.stdout) == (0, "801\n"), done.stderr
    assert "the simulated CUDA does not provide cudaMallocManaged" in done.stderr


def _dedent(text: str) -> str:
    import textwrap

    return textwrap.dedent(text)


def test_operators_are_there_in_child_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print((torch.arange(5, device='cuda') ** 2).sum().item())"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "30\n"), done.stderr


def test_devices_have_memory_of_their_own_and_copy_to_each_other() -> None:
    first = filled(3)
    second = first.to("cuda:1")
    torch.cuda.synchronize(1)
    assert bool((second.cpu() == 3).all())
    assert simulated_cuda.take_reports() == []
