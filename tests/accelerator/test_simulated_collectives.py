"""The stand-in for NCCL by itself (simulated_accelerator/process_group.cpp), whose collectives are late.

Functions whose first argument is a ``Rank`` run in every process.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEED
from support.ranks.simulated import KINDS, NCCL, Rank, Ranks
from support.simulated import (
    DEVICE,
    KIND,
    TUNED,
    assert_same,
    current_stream,
    filled,
    own_backend_only,
    raw,
)

import weightload
from weightload import settings

pytestmark = pytest.mark.simulated

FREED = 0xDD  # the poison of memory.cpp


def all_are(tensor: torch.Tensor, value: int) -> bool:
    return bool((tensor.cpu() == value).all())


def every_collective(rank: Rank, kind: str, members: list[int]) -> None:
    with rank.group(kind, members) as group:
        if group is None:
            return
        me, size = group.rank(), group.size()
        assert group._get_backend(torch.device(DEVICE)).name() == NCCL
        for seed in range(4):
            rank.seed(SEED + seed)
            for dtype in (torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
                mine = torch.arange(600, dtype=torch.uint8).add(me).remainder(2).view(dtype)
                parts = [torch.arange(600, dtype=torch.uint8).add(r).remainder(2).view(dtype) for r in range(size)]
                for root in range(size):
                    sent = mine.to(DEVICE)
                    dist.broadcast(sent, group=group, group_src=root)
                    assert torch.equal(raw(sent), raw(parts[root]))
                whole = torch.empty(mine.numel() * size, dtype=dtype, device=DEVICE)
                own = whole[me * mine.numel() : (me + 1) * mine.numel()]
                own.copy_(mine)
                work = dist.all_gather_into_tensor(whole, own, group=group, async_op=True)
                listed = [torch.empty_like(own) for _ in range(size)]
                dist.all_gather(listed, own, group=group)
                work.wait()
                assert torch.equal(raw(whole), torch.cat([raw(part) for part in parts]))
                assert all(torch.equal(raw(got), raw(part)) for got, part in zip(listed, parts, strict=True))
            for op, want in ((dist.ReduceOp.SUM, sum(range(size))), (dist.ReduceOp.MAX, size - 1)):
                value = torch.full((7,), me, dtype=torch.int64).to(DEVICE)
                dist.all_reduce(value, op, group=group)
                assert value.tolist() == [want] * 7
            dist.broadcast(torch.empty(0, device=DEVICE), group=group, group_src=0)
            dist.barrier(group, device_ids=[0])
        future = dist.broadcast(value.fill_(me), group=group, group_src=size - 1, async_op=True).get_future()
        assert future.done()
        assert future.wait()[0].tolist() == [size - 1] * 7


@pytest.mark.parametrize("members", [[0, 1, 2], [1, 2], [0]])
@pytest.mark.parametrize("kind", KINDS)
def test_every_collective_gives_the_right_bytes(ranks: Ranks, kind: str, members: list[int]) -> None:
    ranks.call(every_collective, kind, members)


def only_streams_wait(rank: Rank) -> None:
    """A collective starts after the stream it was issued on, and only streams that wait for it see its bytes."""
    with rank.group("device") as group:
        side = torch.Stream(device=DEVICE)
        for _ in range(3):
            tensor = filled(rank.number + 1)
            rank.native.synchronize(0)
            gate = rank.native.hold_stream(0, side.stream_id)
            with current_stream(side):
                work = dist.broadcast(tensor, group=group, group_src=0, async_op=True)
            assert not work.is_completed()
            assert all_are(tensor, rank.number + 1)  # this stream has not waited
            work.wait()  # it does now, and the host does not
            copy = tensor.clone()
            assert not work.is_completed()
            gate()
            assert all_are(copy, 1)
            assert work.is_completed()


@own_backend_only
def test_a_collective_is_seen_by_streams_that_wait_for_it(ranks: Ranks) -> None:
    ranks.call(only_streams_wait)


def an_event_is_needed(rank: Rank, with_event: bool) -> None:
    """A collective sends what another stream writes only if the stream that it is issued on waits for that."""
    with rank.group("device") as group:
        tensor, new = filled(10 + rank.number), filled(99)
        rank.native.synchronize(0)
        side = torch.Stream(device=DEVICE)
        gate = rank.native.hold_stream(0, side.stream_id) if rank.number == 0 else None
        with current_stream(side):
            if gate:
                tensor.copy_(new)
        if with_event:
            torch.accelerator.current_stream(DEVICE).wait_stream(side)
        work = dist.broadcast(tensor, group=group, group_src=0, async_op=True)
        work.wait()
        if gate and with_event:
            gate()
        assert all_are(tensor, 99 if with_event else 10)
        if gate:
            gate()
        rank.native.synchronize(0)


@own_backend_only
@pytest.mark.parametrize("with_event", [True, False])
def test_a_collective_waits_for_its_stream_and_no_other(ranks: Ranks, with_event: bool) -> None:
    ranks.call(an_event_is_needed, with_event)


def memory_is_kept(rank: Rank, kept_by: str) -> None:
    """The root drops its tensor before the collective runs: it sends poison, unless somebody kept the memory."""
    with rank.group("device") as group:
        tensor = filled(7 if rank.number == 0 else 8)
        rank.native.synchronize(0)
        side = torch.Stream(device=DEVICE)
        gate = rank.native.hold_stream(0, side.stream_id)
        with current_stream(side):
            work: Any = dist.broadcast(tensor, group=group, group_src=0, async_op=True)
            if kept_by == "allocator":
                tensor.record_stream(side)
                work.wait()  # the side stream waits for the collective, and the allocator for the side stream
        if rank.number == 0:
            del tensor
            if kept_by != "work":
                del work
            torch.zeros(1).to(DEVICE).cpu()  # the owner's stream has done all it was told, poisoning too
        gate()
        if rank.number != 0:
            work.wait()
            assert all_are(tensor, FREED if kept_by == "nobody" else 7)
        rank.native.synchronize(0)


@own_backend_only
@pytest.mark.parametrize("kept_by", ["work", "allocator", "nobody"])
def test_memory_is_kept_by_the_work_and_by_nothing_else(ranks: Ranks, kept_by: str) -> None:
    ranks.call(memory_is_kept, kept_by)


def out_of_step(rank: Rank) -> None:
    """Collectives run in the order in which they were issued, whatever streams they were issued on."""
    with rank.group("device") as group:
        streams = [torch.Stream(device=DEVICE) for _ in range(3)]
        for seed in range(10):
            rank.seed(SEED + seed, longest_us=2500)
            copies = []
            for number in range(12):
                with current_stream(streams[(number * (rank.number + 1)) % 3]):
                    tensor = filled(100 * (number % 2) + rank.number)
                    work = dist.broadcast(tensor, group=group, group_src=number % 3, async_op=number % 4 > 0)
                    if work is not None:
                        work.wait()
                    copies.append(tensor.clone().cpu())
            assert [copy[0].item() for copy in copies] == [100 * (n % 2) + n % 3 for n in range(12)]


def test_collectives_from_changing_streams(ranks: Ranks) -> None:
    ranks.call(out_of_step)


def a_rank_is_missing(rank: Rank) -> None:
    with rank.group():  # all are here
        pass
    with rank.group("device", timeout_s=3) as group:
        tensor = filled(rank.number)
        if rank.number != 2:
            work = dist.broadcast(tensor, group=group, group_src=2, async_op=True)
            work.wait()
            rank.native.synchronize(0)
            assert work.is_completed()
            assert not work.is_success()
            with pytest.raises(RuntimeError):
                work.wait()
            work = dist.broadcast(tensor, group=group, group_src=0, async_op=True)  # broken for good
            rank.native.synchronize(0)
            assert not work.is_success()
            assert all_are(tensor, rank.number)
    every_collective(rank, "device", [0, 1, 2])


@own_backend_only
def test_a_rank_that_is_missing_ends_the_others_at_the_timeout(ranks: Ranks) -> None:
    ranks.call(a_rank_is_missing)


def sizes_differ(rank: Rank) -> None:
    with rank.group("device") as group:
        work = dist.broadcast(filled(1, 10 + rank.number), group=group, group_src=0, async_op=True)
        rank.native.synchronize(0)
        with pytest.raises(RuntimeError, match="do not match"):
            work.wait()


@own_backend_only
def test_collectives_that_do_not_match_are_errors(ranks: Ranks) -> None:
    ranks.call(sizes_differ)


def defaults(rank: Rank, paths: list[Path]) -> None:
    """Everything left to defaults, in a group without a backend for the CPU, each rank with a device of its own."""
    os.environ["LOCAL_RANK"] = str(rank.number)
    torch.accelerator.set_device_index(rank.number)
    with settings.override(**TUNED):
        got = dict(weightload.safetensors_weights_iterator(paths))
    assert_same(got, *paths, device=f"{KIND}:{rank.number}")
    # On CUDA every device a process touches costs it half a gigabyte there.
    assert not rank.native.has_context(1 - rank.number)


def test_the_default_group_may_have_no_backend_for_the_cpu(two: Ranks, mixed: list[Path]) -> None:
    two.call(defaults, mixed)


def leaves_in_the_middle(rank: Rank) -> None:
    """The default group has no backend for the CPU here. The last thing a process does is a collective without end."""
    device = f"{KIND}:{torch.accelerator.current_device_index()}"
    value = torch.full((9,), rank.number).to(device)
    dist.broadcast(value, 1)
    assert all_are(value, 1)
    if rank.number == 0:
        atexit.register(lambda: dist.broadcast(torch.zeros(9).to(device), 1, async_op=True))


@own_backend_only
def test_processes_may_end_in_the_middle_of_a_collective(two: Ranks) -> None:
    two.call(leaves_in_the_middle)
    assert two.close() == [0, 0]
