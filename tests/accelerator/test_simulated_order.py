"""Operations keep their order on an accelerator whose streams are late and out of step (device/device.h)."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SEED, TESTS, run_script, write_tensors
from support.simulated import (
    DEVICE,
    OTHER,
    SMALL,
    assert_same,
    assert_untouched,
    current_stream,
    load,
    raw,
    reference_of,
    take_freed_memory,
    two_devices,
)

from weightload import settings

pytestmark = pytest.mark.simulated


def seeds(simulated: Any, count: int, longest_us: int = 1500) -> Any:
    for seed in range(SEED, SEED + count):
        simulated.seed_delays(seed, longest_us)
        yield seed


def test_the_host_never_waits_for_the_device(simulated: Any, shards: list[Path]) -> None:
    """With every stream held, a checkpoint that fits the ring is yielded all the same; nothing has moved yet."""
    gates = [simulated.hold_stream(0, stream) for stream in (0, *simulated.side_streams(0))]
    with settings.override(device_block_bytes=1 << 20):
        got = dict(load(*shards))
    for gate in gates:
        gate()
    assert_same(got, *shards)


def test_fresh_memory_is_not_written_before_its_last_user_is_done(simulated: Any, shards: list[Path]) -> None:
    """The owner stream is late: what it queued before (here the poison of fresh memory) must not come last."""
    gate = simulated.hold_stream(0, 0)
    got = dict(load(*shards))
    gate()
    assert_same(got, *shards)


def test_memory_that_another_tensor_gave_back_is_not_written_too_soon(simulated: Any, mixed: list[Path]) -> None:
    """The stream-ordered allocator hands memory on while work that reads it is still queued."""
    reference = reference_of(*mixed)
    for _ in seeds(simulated, 5):
        with settings.override(**SMALL):
            old = torch.full((4 << 20,), 7, dtype=torch.uint8).to(DEVICE)
            gate = simulated.hold_stream(0, 0)
            kept = old.clone()  # queued, and late
            del old  # its memory is free for the next on this stream
            threading.Timer(0.05, gate).start()
            got = dict(load(*mixed))
            assert bool((kept.cpu() == 7).all())
            for name, tensor in got.items():
                assert torch.equal(raw(tensor), raw(reference[name])), name
            del got, kept


def test_slots_are_not_filled_again_before_they_were_copied_from(simulated: Any, mixed: list[Path]) -> None:
    for _ in seeds(simulated, 5, longest_us=5000):
        with settings.override(**{**SMALL, "pinned_bytes": 128 << 10}):
            assert_same(dict(load(*mixed)), *mixed)


def test_a_tensor_may_be_used_and_dropped_at_once(simulated: Any, mixed: list[Path]) -> None:
    """Work on the current stream is queued at once; the tensor is gone before it runs."""
    reference = reference_of(*mixed)
    for _ in seeds(simulated, 5):
        with settings.override(**SMALL):
            copies = {name: tensor.clone() for name, tensor in load(*mixed)}
        for name, tensor in copies.items():
            assert torch.equal(raw(tensor), raw(reference[name])), name


def test_the_consumer_may_have_a_stream_of_its_own(simulated: Any, mixed: list[Path]) -> None:
    reference = reference_of(*mixed)
    for _ in seeds(simulated, 5):
        stream = torch.Stream(device=DEVICE)
        with settings.override(**SMALL), current_stream(stream):
            copies = {name: tensor.clone() for name, tensor in load(*mixed)}
            for name, tensor in copies.items():
                assert torch.equal(raw(tensor), raw(reference[name])), name
            copies.clear()
            gc.collect()


def test_the_consumer_may_change_its_stream_at_every_tensor(simulated: Any, mixed: list[Path]) -> None:
    """Memory belongs to the stream it was allocated on: others' work must be told to the allocator."""
    reference = reference_of(*mixed)
    for _ in seeds(simulated, 5):
        copies = {}
        streams = [torch.Stream(device=DEVICE) for _ in range(4)]
        with settings.override(**SMALL):
            weights = load(*mixed)
            for number in range(len(weights)):
                with current_stream(streams[number % 4]):
                    name, tensor = next(weights)
                    copies[name] = (tensor.clone(), streams[number % 4])
                del tensor
        for name, (tensor, stream) in copies.items():
            with current_stream(stream):
                assert torch.equal(raw(tensor), raw(reference[name])), name
        copies.clear()


def test_a_stream_that_was_not_current_at_the_start_is_known_to_the_allocator(
    simulated: Any, mixed: list[Path]
) -> None:
    """The consumer's stream is held back while the tensors it reads are dropped: their memory must wait for it."""
    reference = reference_of(*mixed)
    weights = load(*mixed)
    stream = torch.Stream(device=DEVICE)
    copies = {}
    gate = None
    with current_stream(stream):
        for name, tensor in weights:
            if gate is None:
                gate = simulated.hold_stream(0, stream.stream_id)
            copies[name] = tensor.clone()
            del tensor
    gc.collect()
    # Memory that is free may be written by now: the owner stream has done all it was told.
    torch.zeros(1).to(DEVICE).cpu()
    assert gate is not None
    gate()
    with current_stream(stream):
        for name, tensor in copies.items():
            assert torch.equal(raw(tensor), raw(reference[name])), name
    copies.clear()


@pytest.mark.parametrize("taken", [0, 1, 20, 50])
def test_blocks_that_nobody_took_outlive_their_copies(simulated: Any, shards: list[Path], taken: int) -> None:
    """Leaving early frees blocks whose copies are still queued. What takes their memory next must stay whole."""
    for _ in seeds(simulated, 3):
        gates = [simulated.hold_stream(0, stream) for stream in simulated.side_streams(0)]
        with settings.override(**{**SMALL, "pinned_bytes": 64 << 20}):
            weights = load(*shards)
            for _ in range(taken):
                next(weights)
            weights.close()
        del weights
        gc.collect()
        taken_over = take_freed_memory()  # must not be what the held streams still write to
        for gate in gates:
            gate()
        simulated.synchronize(0)
        assert_untouched(taken_over)
        del taken_over


def test_two_loads_at_once_do_not_disturb_each_other(simulated: Any, mixed: list[Path]) -> None:
    for _ in seeds(simulated, 3):
        with settings.override(**SMALL):
            first, second = load(*mixed), load(*reversed(mixed))
            ours: list[dict[str, torch.Tensor]] = [{}, {}]
            for (a, x), (b, y) in zip(first, second, strict=True):
                ours[0][a], ours[1][b] = x, y
        for got in ours:
            assert_same(got, *mixed)
        ours.clear()
        del got, x, y


@two_devices
def test_loads_from_several_threads_to_several_devices(simulated: Any, mixed: list[Path]) -> None:
    failures: list[BaseException] = []

    def run(device: str) -> None:
        try:
            with settings.override(**SMALL):
                for _ in range(3):
                    assert_same(dict(load(*mixed, device=device)), *mixed, device=device)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=((DEVICE, OTHER)[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_may_share_an_iterator(simulated: Any, mixed: list[Path]) -> None:
    with settings.override(**SMALL):
        weights = load(*mixed)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    threads = [threading.Thread(target=lambda part=part: part.update(weights)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same({name: tensor for part in parts for name, tensor in part.items()}, *mixed)


@two_devices
def test_the_current_device_is_left_alone(simulated: Any, mixed: list[Path]) -> None:
    torch.accelerator.set_device_index(1)
    try:
        assert_same(dict(load(*mixed)), *mixed)
        assert torch.accelerator.current_device_index() == 1
        assert torch.accelerator.current_stream(OTHER).stream_id == 0
    finally:
        torch.accelerator.set_device_index(0)


@two_devices
def test_a_load_to_one_device_touches_no_other(simulated: Any, mixed: list[Path]) -> None:
    """On CUDA every touch is a context: half a gigabyte on GPU 0 for each rank. In a fresh process."""
    script = f"""
    import gc, sys
    sys.path.insert(0, {str(TESTS)!r})
    from support import simulated
    from support.simulated import OTHER
    native = simulated.native()
    from pathlib import Path
    import torch, weightload
    from support.simulated import SMALL, load
    from weightload import settings
    paths = [Path(path) for path in sys.argv[1:]]
    with settings.override(**SMALL):
        got = dict(load(*paths, device=OTHER))
        dict(load(*paths, device=OTHER))
        with load(*paths, device=OTHER) as weights:
            next(weights)
        weightload.load_into(got, paths)
        native.fail_pinned_after(0)
        got = dict(load(*paths, device=OTHER))
    del got, weights
    gc.collect()
    print(native.has_context(0), native.has_context(1))
    """
    done = run_script(script, *mixed)
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr


def test_device_memory_beyond_the_tensors_is_a_block_or_two(simulated: Any, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "t.safetensors", [(f"{i}", "BF16", [1000, 33]) for i in range(300)])
    block = 1 << 20
    simulated.seed_delays(SEED, longest_us=2000)
    with settings.override(device_block_bytes=block, slot_bytes=64 << 10):
        simulated.reset_peak(0)
        for _, tensor in load(path):
            tensor.cpu()  # far slower than reading, which must wait for it
            del tensor
        assert simulated.peak_bytes(0) <= 3 * block  # the one in hand, and two
        gc.collect()
        simulated.reset_peak(0)
        got = dict(load(path))
        assert simulated.peak_bytes(0) <= 1.02 * sum(tensor.nbytes for tensor in got.values()) + block
        assert simulated.live_bytes(0) <= 1.02 * sum(tensor.nbytes for tensor in got.values())
    del got


def test_pinned_memory_is_at_most_the_ring_and_given_back(simulated: Any, mixed: list[Path]) -> None:
    with settings.override(**SMALL):
        weights = load(*mixed)
        next(weights)
        assert 0 < simulated.pinned_bytes() <= SMALL["pinned_bytes"]
        dict(weights)
        assert simulated.pinned_bytes() == 0
    with settings.override(**{**SMALL, "slot_bytes": 20480, "pinned_bytes": 20480}):
        weights = load(*mixed)
        next(weights)
        assert 0 < simulated.pinned_bytes() <= 16384  # of 20480 torch's allocator would lock 32768
        weights.close()
    tiny = load(mixed[0], names={"odd.1"})
    dict(tiny)
    assert tiny.stats().device.slots <= 2


def test_memory_lives_as_long_as_any_tensor_of_its_block(simulated: Any, mixed: list[Path]) -> None:
    reference = reference_of(*mixed)
    with settings.override(**SMALL):
        kept = [(name, tensor) for number, (name, tensor) in enumerate(load(*mixed)) if number % 97 == 5]
    gc.collect()
    torch.full((8 << 20,), 3, dtype=torch.uint8).to(DEVICE)
    for name, tensor in kept:
        assert torch.equal(raw(tensor), raw(reference[name])), name
    del kept, tensor
