"""The rounds of compare_loaders.py: every loader in a process of its own, and the limits, taking turns."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch
from host_limits import Limit, limits_for
from loader_worker import FailedError, Worker
from machine import NotEvictedError, back_memory, evict, fill_cache, resident_share
from peers import BASELINES, MAPPED, find, kind_of

from weightload.cpus import usable_cpus


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
        """The untimed first load of the process, whose tensors are compared; it also warms the process up."""
        answer = self.load(thorough=True)
        for key in ("private_peak_bytes", "kept_bytes", "driver_peak_bytes"):
            self.facts[key] = answer[key] if answer else None

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
        """As asked for, and verified.

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
    """One scenario: the loaders of one kind and their limits, in one state of the page cache."""

    def __init__(self, arms: Sequence[Arm], files: list[str], place: str, cache: str, kind: str) -> None:
        self.arms = [arm for arm in arms if arm.kind == kind]
        self.files, self.state = files, State(files, cache, kind)
        self.found: dict[str, Any] = {"place": place, "cache": cache, "kind": kind, "reason": None, "note": None}
        self.answers: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in self.arms}
        self.fresh: dict[str, list[float]] = {arm.name: [] for arm in self.arms}
        self.seconds: dict[str, list[float]] = {}
        self.why_not: dict[str, str] = {}  # limits that cannot be measured
        self.last: Arm | None = None  # the one that loaded last

    def run(self, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
        """As many rounds as are asked for and fit into the budget."""
        kind, cache = self.found["kind"], self.found["cache"]
        limits, held_against = limits_for(kind, cache, device)
        self.seconds = {name: [] for name in limits}
        try:
            self._rounds(limits, options)
            if options.fresh and cache == "warm" and self.found["place"] == "disk":
                self._fresh_rounds(options.fresh, options.budget)
        except NotEvictedError as error:
            self.found["reason"] = str(error)
        self.found["note"] = self.state.note
        self.found["limits"] = [
            {"limit": name, "seconds": seconds, "reason": self.why_not.get(name), "held_against": name in held_against}
            for name, seconds in self.seconds.items()
        ]
        self.found["rows"] = [self._row(arm) for arm in self.arms]
        return self.found

    def _fresh_rounds(self, rounds: int, budget: float) -> None:
        """Loads that are the first of a new process, in turns too, of each one's best setting."""
        arms = self._best_of_each()
        deadline = time.monotonic() + budget
        for number in range(rounds):
            begin = time.monotonic()
            turn = number % max(1, len(arms))
            for arm in arms[turn:] + arms[:turn]:
                self._fresh_load(arm)
            now = time.monotonic()
            if now + (now - begin) > deadline:
                break

    def _fresh_load(self, arm: Arm) -> None:
        new = arm.start_another()
        if new is None:
            return
        try:
            answer = arm.load_in(new, lambda: self.state.prepare(self.last))
            self.fresh[arm.name] += [answer["seconds"]] if answer else []
        finally:
            new.close()

    def _rounds(self, limits: dict[str, Limit], options: argparse.Namespace) -> None:
        turns: list[Arm | str] = [*limits, *self.arms]
        deadline = 0.0
        for number in range(options.warmup + options.repeats):
            begin = time.monotonic()
            counted = number >= options.warmup
            if number == options.warmup:
                deadline = begin + options.budget
            if number == options.warmup + options.heats:
                turns = [*limits, *self._best_of_each()]
            turn = number % len(turns)
            for each in turns[turn:] + turns[:turn]:
                if isinstance(each, Arm) and each.worker is None:
                    continue
                # The first counted round is finished whatever it takes: else some would have no time at all.
                if number > options.warmup and time.monotonic() > deadline:
                    return
                self.state.prepare(self.last)
                self._turn(each, limits, counted)
            now = time.monotonic()
            # After the heats a round has fewer turns.
            ahead = (
                len(self._best_of_each()) + len(limits) if number + 1 >= options.warmup + options.heats else len(turns)
            )
            if counted and now + (now - begin) * ahead / len(turns) > deadline:
                return

    def _turn(self, each: Arm | str, limits: dict[str, Limit], counted: bool) -> None:
        if isinstance(each, Arm):
            answer = each.load(files=self.files)
            self.last = each
            self.answers[each.name] += [answer] if answer and counted else []
            return
        if each in self.why_not:
            return
        try:
            seconds = limits[each](self.files)
            self.seconds[each] += [seconds] if counted else []
        except OSError as error:
            self.why_not[each] = str(error)

    def _best_of_each(self) -> list[Arm]:
        """After the heats only the fastest of each one's settings so far goes on; and what others are held against."""
        best: dict[str, Arm] = {}
        for arm in self.arms:
            times = self._times(arm)
            if arm.worker and times:
                other = best.get(arm.facts["of"])
                if other is None or statistics.median(times) < statistics.median(self._times(other)):
                    best[arm.facts["of"]] = arm
        baseline = BASELINES.get(self.found["kind"])
        return [arm for arm in self.arms if arm in best.values() or (arm.name == baseline and arm.worker)]

    def _times(self, arm: Arm) -> list[float]:
        return [answer["seconds"] for answer in self.answers[arm.name]]

    def _row(self, arm: Arm) -> dict[str, Any]:
        answers = self.answers[arm.name]
        return {
            "loader": arm.name,
            "seconds": self._times(arm),
            "fresh_seconds": self.fresh[arm.name],
            "cpu_seconds": [answer["cpu_s"] for answer in answers],
            "touch_seconds": [answer["touch_s"] for answer in answers],
            "peak_bytes": max((answer["peak_bytes"] or 0 for answer in answers), default=0) or None,
            "stats": answers[-1]["stats"] if answers else None,
        }
