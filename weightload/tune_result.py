"""What tune measured, and what follows from it."""

from __future__ import annotations

import dataclasses

from weightload.settings import Settings
from weightload.tune_candidates import IN_FORCE, Candidate
from weightload.tune_loads import Sample
from weightload.tune_storage import Storage
from weightload.tune_turns import Seconds
from weightload.tune_verdict import differ, outcomes

# Differences of less than this, in a load of the whole checkpoint, are nobody's concern.
LEAST_SECONDS = 0.02


@dataclasses.dataclass
class Tuning:
    """What was measured, and what follows."""

    storage: Storage
    device: str
    cpus: int
    sample: Sample
    checkpoint_bytes: int
    now: Settings
    """The settings in force."""
    origins: dict[str, str]
    """Where each of them comes from."""
    seconds_allowed: float
    seconds_taken: float = 0.0
    why_not_cold: str | None = None
    """Why there are no cold loads, in words; None where there are."""
    tried: list[Candidate] = dataclasses.field(default_factory=list)
    left_out: list[Candidate] = dataclasses.field(default_factory=list)
    """Candidates that there was no time for."""
    measured: dict[str, Seconds] = dataclasses.field(default_factory=dict)
    """Seconds of the loads of all candidates, by the state of the page cache."""
    again: dict[str, Seconds] = dataclasses.field(default_factory=dict)
    """Seconds of the loads of what came out ahead, measured again beside the settings in force."""
    ahead: list[Candidate] = dataclasses.field(default_factory=list)
    """Single settings that came out ahead at first."""
    recommended: Candidate = IN_FORCE
    undecided: bool = False
    """Whether what came out ahead could not be measured again often enough to recommend it or not."""

    @property
    def least_seconds(self) -> float:
        """LEAST_SECONDS, of a load of the sample."""
        return LEAST_SECONDS * self.sample.bytes / max(1, self.checkpoint_bytes)

    @property
    def compared(self) -> bool:
        """Whether any candidate was measured often enough to say something of it."""
        return any(
            outcome != "unknown"
            for candidate in self.tried[1:]
            for outcome in outcomes(self.measured, candidate, self.least_seconds).values()
        )

    def trade_offs(self) -> list[tuple[Candidate, str, str]]:
        """Candidates that are faster in one state and slower in the other: (candidate, faster in, slower in)."""
        found = []
        for candidate in self.tried:
            by_state = outcomes(self.measured, candidate, self.least_seconds, differ)
            faster = [state for state, outcome in by_state.items() if outcome == "faster"]
            slower = [state for state, outcome in by_state.items() if outcome == "slower"]
            found += [(candidate, faster[0], slower[0])] if faster and slower else []
        return found
