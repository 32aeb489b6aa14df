"""What tune tries: the settings in force, and each setting changed by itself; and how much of a checkpoint it loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from weightload.settings import MIB, READ_MODES, Settings
from weightload.settings_page import shown

Value = int | str

# Times the value in force. On the way to the storage there is seldom a use for more threads.
THREAD_FACTORS, MOST_THREADS = (2, 4, 0.5, 8, 0.25), 64
SIZE_FACTORS = (0.25, 4)

# Bytes of a load. Below the least, starting and ending it is what is measured; the most bounds the memory it takes.
LEAST_SAMPLE, MOST_SAMPLE = 64 * MIB, 2048 * MIB
# Loads of a candidate: with fewer it cannot come out ahead; measured again, with fewer nothing is recommended (of four
# and four, chance alone puts all of one before all of the other in 1 of 70); with more nothing is gained.
LEAST_RUNS, LEAST_AGAIN, MOST_RUNS = 3, 5, 9
# The settings in force, the best change, all changes.
MOST_AGAIN = 3
# Times what the least number of loads takes: below the first a candidate is left out; the second is planned for.
ENOUGH, PLANNED = 1.2, 1.6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to load with, as changes to those in force."""

    changes: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name} {shown(name, value)}" for name, value in self.changes) or "in force"


IN_FORCE = Candidate()


def candidates(now: Settings, to_accelerator: bool) -> list[Candidate]:
    """The settings in force, then single changes of them, those that most often matter first.

    Where the environment has changed a setting, its default is among them.
    """
    found = [IN_FORCE]
    for name in ("threads", "read", "slot_bytes", "device_block_bytes", "pinned_bytes") if to_accelerator else (
        "threads", "task_bytes", "window_bytes",
    ):  # fmt: skip
        tried = {_effective(now, name)}
        for value in (getattr(Settings(), name), *_values(now, name)):
            try:
                changed = dataclasses.replace(now, **{name: value})
            except ValueError:  # a ring that is smaller than a slot
                continue
            if _effective(changed, name) not in tried:
                tried.add(_effective(changed, name))
                found.append(Candidate(((name, value),)))
    return found


def _effective(settings: Settings, name: str) -> Value:
    value: Value = settings.thread_count() if name == "threads" else getattr(settings, name)
    return value


def _values(now: Settings, name: str) -> list[Value]:
    if name == "read":
        return list(READ_MODES)
    if name == "threads":
        threads = now.thread_count()
        return [int(threads * factor) for factor in THREAD_FACTORS if 1 <= threads * factor <= MOST_THREADS]
    size = getattr(now, name)
    return [max(64 << 10, int(size * factor) // 4096 * 4096) for factor in SIZE_FACTORS]


def least_loads(tried: int) -> tuple[int, int]:
    """How many loads so many candidates need at least: at first, and to measure again what came out ahead."""
    return LEAST_RUNS * tried, LEAST_AGAIN * min(MOST_AGAIN, tried)


def fit(
    tried: Sequence[Candidate], bytes_per_second: float, seconds: float, total_bytes: int
) -> tuple[int, list[Candidate]]:
    """How many bytes a load may have, and which candidates there is time for, the first ones of those given.

    Slow storage gets smaller loads, down to LEAST_SAMPLE, then fewer candidates, down to none but the settings in
    force.

    Args:
        tried: the candidates, with the settings in force in front.
        bytes_per_second: of a load with the settings in force, all that goes with it included.
        seconds: for all loads together, those to measure again among them.
        total_bytes: of the checkpoint.
    """
    all_bytes = bytes_per_second * seconds
    least = min(LEAST_SAMPLE, total_bytes)
    fitting = [number for number in range(1, len(tried) + 1) if ENOUGH * sum(least_loads(number)) * least <= all_bytes]
    kept = list(tried[: max(fitting, default=1)])
    planned = int(all_bytes / (PLANNED * sum(least_loads(len(kept)))))
    return min(max(planned, least), MOST_SAMPLE, total_bytes), kept if len(kept) > 1 else [IN_FORCE]
