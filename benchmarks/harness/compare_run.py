"""The rounds of compare_loaders.py: every loader in a process of its own, and the limits, taking turns."""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch
from loaders.peers import BASELINES, MAPPED, find, kind_of
from loaders.worker import FailedError, Worker

from harness.host_limits import Limit, limits_for, setting_of
from harness.machine import NotEvictedError, back_memory, evict, fill_cache, resident_share
from weightload._base.cpus import usable_cpus

Loads = dict[str, list[dict[str, Any]]]  # what each one's loads answered


class Arm:
    """A loader in the comparison: its process, and what has been learned of it."""

    def __init__(self, name: str, files: list[str], device: torch.device, log: IO[bytes], limit_s: float) -> None:
        self.name = name
        peer = find(name)
        self.kind = kind_of(peer, device)
        self.facts: dict[str, Any] = {"of": peer.of, "kind": self.kind, "version": None, "reason": None, "wrong": None}
        self.worker: Worker | None = None
        self._start: Callable[[], Worker] = lambda: Worker(name, files, device, log, limit_s)

    def start(self) -> None:
        """Start its process."""
        self._attempt(lambda: setattr(self, "worker", self._start()))

    def ready(self) -> None:
        """Wait until its process is set up."""
        self._attempt(lambda: self.facts.update(self.worker.ready() if self.worker else {}))

    def check(self) -> None:
        """Two untimed loads, the first of the process: memory is watched, then tensors are compared."""
        self.facts |= dict.fromkeys(("private_peak_bytes", "kept_bytes", "driver_peak_bytes"))
        self._attempt(lambda: self.facts.update(self.worker.watched() if self.worker else {}))
        self.load(thorough=True)

    def load(self, thorough: bool = False, files: list[str] | None = None) -> dict[str, Any] | None:
        """One load, or None if the loader has dropped out."""
        answer: dict[str, Any] = {}
        self._attempt(lambda: answer.update(self.worker.load(thorough, files) if self.worker else {}))
        return self._checked(answer)

    def start_another(self) -> Worker | None:
        """A new process beside the one that is kept."""
        found: list[Worker] = []
        if self.worker:
            self._attempt(lambda: found.append(self._start()))
        return found[0] if found else None

    def load_in(self, worker: Worker, prepare: Callable[[], None]) -> dict[str, Any] | None:
        """The first load of a new process; what must be prepared is when the process has been set up."""
        answer: dict[str, Any] = {}

        def load() -> None:
            worker.ready()
            prepare()
            answer.update(worker.load())

        self._attempt(load)
        return self._checked(answer)

    def drop(self, reason: str) -> None:
        self.facts["reason"] = reason
        self.close()

    def close(self) -> None:
        if self.worker:
            self.worker.close()
        self.worker = None

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any] | None:
        if answer.get("wrong"):
            self.facts["wrong"] = answer["wrong"]
            self.drop("wrong bytes")
        return answer or None

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except FailedError as error:
            self.drop(str(error))


def start_all(arms: Sequence[Arm]) -> None:
    """Start the processes of all, as many at once as there are processors for their imports."""
    for at in range(0, len(arms), usable_cpus()):
        for arm in arms[at : at + usable_cpus()]:
            arm.start()
        for arm in arms[at : at + usable_cpus()]:
            arm.ready()


class State:
    """Brings files and memory into the state that every load of a scenario starts from."""

    def __init__(self, files: list[str], cache: str, kind: str) -> None:
        self.files, self.cache = files, cache
        self.note: str | None = None
        total = sum(map(os.path.getsize, files))
        # Memory for a cold run's page cache; for private copies, and as much again. Mapping needs none.
        self._backed = (total if cache == "cold" else 0) + (2 * total if kind not in (MAPPED, "device") else 0)

    def prepare(self, last: Arm | None) -> None:
        """Bring cache and memory into the state that was asked for, and verify it.

        Raises:
            NotEvictedError: something holds the files in the page cache, and it is not the loader that ran last.
        """
        gc.collect()
        if self.cache == "cold":
            self._make_cold(last)
        else:
            self._make_warm()
        if self._backed:
            back_memory(self._backed)

    def _make_cold(self, last: Arm | None) -> None:
        try:
            evict(self.files)
        except NotEvictedError:
            if last is None or last.worker is None:
                raise
            last.drop("after its load it holds the files in the page cache")
            evict(self.files)

    def _make_warm(self) -> None:
        try:
            if resident_share(self.files) == 1:
                return
            fill_cache(self.files)
            share = resident_share(self.files)
            self.note = None if share == 1 else f"only {share:.1%} of the files fit into the page cache"
        except NotEvictedError as error:
            fill_cache(self.files)
            self.note = f"not verified: {error}"


class Rounds:
    """One scenario: the loaders of one kind and their limits, in one state of the page cache.

    Of several settings of one loader, or of one limit, heats choose the fastest. Only that one goes on to the rounds
    that count, in which the times of the heats do not: they are the ones it was chosen for.
    """

    def __init__(
        self, arms: Sequence[Arm], files: list[str], place: str, cache: str, kind: str, order: random.Random
    ) -> None:
        self.arms = {arm.name: arm for arm in arms if arm.kind == kind}
        self.files, self.state, self.order = files, State(files, cache, kind), order
        self.found: dict[str, Any] = {"place": place, "cache": cache, "kind": kind, "reason": None, "note": None}
        self.limits: dict[str, Limit] = {}
        self.heats: Loads = {}
        self.counted: Loads = {}
        self.dropped: list[str] = []  # after the heats
        self.fresh: dict[str, list[float]] = {name: [] for name in self.arms}
        self.why_not: dict[str, str] = {}  # limits that cannot be measured
        self.last: Arm | None = None  # the one that loaded last

    def run(self, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
        """Run as many rounds as are asked for and fit into the budget."""
        kind, cache = self.found["kind"], self.found["cache"]
        self.limits, held_against = limits_for(kind, cache, device)
        names = [*self.limits, *self.arms]
        self.heats, self.counted = {name: [] for name in names}, {name: [] for name in names}
        try:
            self._rounds(options)
            if options.fresh and cache == "warm" and self.found["place"] == "disk":
                self._fresh_rounds(options.fresh, options.budget)
        except NotEvictedError as error:
            self.found["reason"] = str(error)
        self.found["note"] = self.state.note
        self.found["limits"] = [
            {
                "limit": name,
                **self._seconds(name),
                "reason": self.why_not.get(name),
                "held_against": setting_of(name) in held_against,
            }
            for name in self.limits
        ]
        self.found["rows"] = [self._row(name) for name in self.arms]
        return self.found

    def _rounds(self, options: argparse.Namespace) -> None:
        names = [*self.limits, *self.arms]
        self._repeat(names, options.warmup, None)
        alike = Counter(map(self._owner, names))
        self._repeat([name for name in names if alike[self._owner(name)] > 1], options.heats, self.heats)
        self.dropped = self._beaten()
        going_on = [name for name in names if name not in self.dropped]
        self._repeat(going_on, options.repeats, self.counted, options.budget)

    def _repeat(self, names: list[str], rounds: int, keep: Loads | None, budget: float = math.inf) -> None:
        """Everything once a round, shuffled. The first round is finished whatever it takes, and none has no time."""
        deadline = time.monotonic() + budget
        for number in range(rounds):
            begin = time.monotonic()
            for name in self.order.sample(names, len(names)):
                if number and time.monotonic() > deadline:
                    return
                if name in self.arms and self.arms[name].worker is None:
                    continue
                self.state.prepare(self.last)
                answer = self._turn(name)
                if answer and keep is not None:
                    keep[name].append(answer)
            now = time.monotonic()
            if now + (now - begin) > deadline:
                return

    def _turn(self, name: str) -> dict[str, Any] | None:
        if name in self.arms:
            self.last = self.arms[name]
            return self.last.load(files=self.files)
        if name in self.why_not:
            return None
        try:
            return {"seconds": self.limits[name](self.files)}
        except OSError as error:
            self.why_not[name] = str(error)
            return None

    def _owner(self, name: str) -> str:
        return str(self.arms[name].facts["of"]) if name in self.arms else f"limit: {setting_of(name)}"

    def _beaten(self) -> list[str]:
        """Those that were in the heats and not the fastest of their owner; never what others are held against."""
        took = {
            name: statistics.median(a["seconds"] for a in answers) for name, answers in self.heats.items() if answers
        }
        took = {name: s for name, s in took.items() if name not in self.arms or self.arms[name].worker}
        fastest: dict[str, str] = {}
        for name in sorted(took, key=lambda name: took[name]):
            fastest.setdefault(self._owner(name), name)
        baseline = BASELINES.get(self.found["kind"])
        return [name for name in took if name not in fastest.values() and name != baseline]

    def _fresh_rounds(self, rounds: int, budget: float) -> None:
        """Loads that are the first of a new process, in turns too, of those that went on."""
        arms = [arm for name, arm in self.arms.items() if name not in self.dropped]
        deadline = time.monotonic() + budget
        for _ in range(rounds):
            begin = time.monotonic()
            order = self.order.sample(arms, len(arms))
            # Start as many at once as there are processors for their imports; they load one after the other.
            for at in range(0, len(order), usable_cpus()):
                started = [(arm, arm.start_another()) for arm in order[at : at + usable_cpus()]]
                try:
                    for arm, new in started:
                        if new is not None:
                            self._fresh_load(arm, new)
                finally:
                    for _, new in started:
                        if new is not None:
                            new.close()
            now = time.monotonic()
            if now + (now - begin) > deadline:
                break

    def _fresh_load(self, arm: Arm, new: Worker) -> None:
        answer = arm.load_in(new, lambda: self.state.prepare(self.last))
        self.fresh[arm.name] += [answer["seconds"]] if answer else []
        new.close()

    def _seconds(self, name: str) -> dict[str, Any]:
        return {
            "seconds": [answer["seconds"] for answer in self.counted[name]],
            "heat_seconds": [answer["seconds"] for answer in self.heats[name]],
            "dropped_after_heats": name in self.dropped,
        }

    def _row(self, name: str) -> dict[str, Any]:
        answers = self.counted[name]
        return {
            "loader": name,
            **self._seconds(name),
            "fresh_seconds": self.fresh[name],
            "cpu_seconds": [answer["cpu_s"] for answer in answers],
            "touch_seconds": [answer["touch_s"] for answer in answers],
            "peak_bytes": max((answer["peak_bytes"] or 0 for answer in answers), default=0) or None,
            "stats": answers[-1]["stats"] if answers else None,
        }
