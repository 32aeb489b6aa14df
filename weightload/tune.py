"""tune: measures loads of a checkpoint with other settings than those in force, and says which are worth changing.

In a fixed time: a first look at the speed decides how much of the checkpoint a load has and how many candidates there
are; these take turns, cold then warm; what came out ahead is measured again, beside the settings in force, and is
recommended only if it comes out ahead again. The best of many candidates always looks better than it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from weightload import settings
from weightload.cpus import usable_cpus
from weightload.errors import CheckpointError
from weightload.fetch import meminfo
from weightload.tune_candidates import IN_FORCE, LEAST_SAMPLE, MOST_SAMPLE, Candidate, candidates, fit, least_loads
from weightload.tune_loads import Checkpoint, Loads, Sample, checkpoint_of
from weightload.tune_result import Tuning
from weightload.tune_storage import NotColdError, storage_of, why_never_cold
from weightload.tune_turns import Clock, Loader, Seconds, take_turns
from weightload.tune_verdict import shortlist, to_confirm, undecided, verdict

MakeLoads = Callable[[Sample, torch.device], Loader]
Tell = Callable[[str], object]

# Shares of the time: the first look; of what is left then, cold loads, where there are cold and warm ones, and filling
# the page cache, where there are warm ones only.
LOOK, COLD, FILL = 0.2, 0.78, 0.25
# A load that takes less says little of a long one.
LEAST_LOOK_S = 0.3


def tune(
    paths: Sequence[str],
    device: torch.device,
    seconds: float,
    *,
    clock: Clock = time.monotonic,
    make_loads: MakeLoads = Loads,
    tell: Tell = lambda _: None,
) -> Tuning:
    """Measure for at most this long (and what a load under way needs to stop), and decide.

    Args:
        paths: the files of a checkpoint, never written to. Their pages are put out of the page cache.
        device: where to load to.
        seconds: for everything.
        clock, make_loads: for tests.
        tell: is called with a sentence now and then about what is going on.

    Raises:
        CheckpointError: no tensor has any bytes.
        ValueError: settings in force that are not allowed.
        OSError, WeightLoadError: as ``safetensors_weights_iterator``.
    """
    end = clock() + seconds
    checkpoint = checkpoint_of(paths)
    if not checkpoint.bytes:
        raise CheckpointError(f"{paths[0] if paths else 'the checkpoint'}: no tensor to load")
    most = min(checkpoint.bytes, MOST_SAMPLE, max(LEAST_SAMPLE, _available_memory() // 4))
    done = Tuning(
        storage=storage_of(paths[0]),
        device=str(device),
        cpus=usable_cpus(),
        sample=checkpoint.sample(most),
        checkpoint_bytes=checkpoint.bytes,
        now=settings.current(),
        origins=settings.origins(),
        seconds_allowed=seconds,
    )
    done.why_not_cold = why_never_cold(done.sample.files)
    tell("a first look at the speed")
    plan = _look(done, checkpoint, most, device, end, clock, make_loads)
    if plan:
        loads = make_loads(done.sample, device)
        for state, share in plan.items():
            until = clock() + share * (end - clock())
            tell(f"{state} loads, {len(done.tried)} candidates, at most {until - clock():.0f} s")
            _measure(done, done.measured, done.tried, loads, state, until, clock)
        done.ahead = shortlist(done.measured, done.tried, done.least_seconds)
        confirming = to_confirm(done.ahead)
        if confirming:
            for state in list(done.measured):
                until = clock() + (COLD if state == "cold" else 1) * (end - clock())
                tell(f"{state} loads again, {' and '.join(map(str, confirming))}, at most {until - clock():.0f} s")
                _measure(done, done.again, [IN_FORCE, *confirming], loads, state, until, clock)
            done.recommended = verdict(done.again, confirming, done.least_seconds)
            done.undecided = done.recommended == IN_FORCE and undecided(done.again, confirming, done.least_seconds)
    done.seconds_taken = seconds - (end - clock())
    return done


def _look(
    done: Tuning,
    checkpoint: Checkpoint,
    most: int,
    device: torch.device,
    end: float,
    clock: Clock,
    make_loads: MakeLoads,
) -> dict[str, float]:
    """Find out how fast loads are, and choose sample and candidates by that.

    Returns:
        The states of the page cache to measure in first, each with a share of the time that is left when it begins;
        none if not even one load ends in time.
    """
    until = clock() + LOOK * (end - clock())
    size, speed, filling = min(LEAST_SAMPLE, most), 0.0, 0.0
    while True:
        done.sample = checkpoint.sample(size)
        loads, fill_begin = make_loads(done.sample, device), clock()
        if done.why_not_cold is None or loads.fill_page_cache(until - clock()):
            filling = done.sample.bytes / max(1e-6, clock() - fill_begin)
            took = _fastest_of_two(done, loads, until, clock)
        else:
            took = None
        if took is None:
            break
        speed = done.sample.bytes / max(1e-6, took)
        if took >= LEAST_LOOK_S or size == most or clock() >= until:
            break
        size = min(most, 8 * size)
    if not speed:
        return {}
    both = done.why_not_cold is None
    every = candidates(done.now, device.type != "cpu")
    bytes_, done.tried = fit(every, speed, (COLD if both else 1 - FILL) * (end - clock()), most)
    if not both:
        bytes_ = min(bytes_, max(LEAST_SAMPLE, int(filling * FILL * (end - clock()))))
    done.left_out = every[len(done.tried) :]
    done.sample = checkpoint.sample(bytes_)
    # The rest is for measuring again.
    at_first, again = least_loads(len(done.tried)) if len(done.tried) > 1 else (1, 0)
    share = at_first / (at_first + again)
    if not both:
        return {"warm": FILL + (1 - FILL) * share}
    return {"cold": COLD * share, "warm": (1 - COLD) * share / (1 - COLD * share)}


def _fastest_of_two(done: Tuning, loads: Loader, until: float, clock: Clock) -> float | None:
    """Seconds of a load and of what is done before it, or None where there is no time for one.

    The first one alone would mislead: a virtual machine's host gives memory when it is first touched, at a fraction of
    the speed of storage.
    """
    cost = []
    for _ in range(2):
        begin = clock()
        try:
            took = loads.seconds(IN_FORCE, "warm" if done.why_not_cold else "cold", until - begin)
        except NotColdError as error:
            done.why_not_cold = str(error)
            took = loads.seconds(IN_FORCE, "warm", until - clock())
        if took is None:
            break
        cost.append(clock() - begin)
    return min(cost, default=None)


def _measure(
    done: Tuning,
    results: dict[str, Seconds],
    tried: Sequence[Candidate],
    loads: Loader,
    state: str,
    until: float,
    clock: Clock,
) -> None:
    """Have candidates take turns in one state of the page cache."""
    if state == "warm" and not loads.fill_page_cache(until - clock()):
        return
    try:
        results[state] = take_turns(tried, loads, state, until, clock)
    except NotColdError as error:
        done.why_not_cold = str(error)


def _available_memory() -> int:
    """Bytes that can be had without swapping; without bound where the kernel does not say."""
    return meminfo().get("MemAvailable", 1 << 62)
