"""The loads that tune measures: a sample of a checkpoint's tensors, loaded as users load them."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Sequence

import torch

from weightload import settings
from weightload.dtypes import TORCH_DTYPES
from weightload.iterator import safetensors_weights_iterator
from weightload.page_touch import touch
from weightload.selection import open_files
from weightload.tune_candidates import Candidate
from weightload.tune_storage import NotColdError, evict


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some tensors of a checkpoint."""

    files: tuple[str, ...]
    names: frozenset[str]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What can be loaded: (file, name, bytes) of each tensor that torch has a dtype for, in the order of loading."""

    tensors: tuple[tuple[str, str, int], ...]
    bytes: int

    def sample(self, size: int) -> Sample:
        """Tensors of about this many bytes, from the beginning, at least one: each is loaded whole or not at all."""
        left, chosen = size, []
        for tensor in self.tensors:
            if tensor[2] <= left:
                chosen.append(tensor)
                left -= tensor[2]
        if not any(bytes_ for *_, bytes_ in chosen):
            chosen = [min((tensor for tensor in self.tensors if tensor[2]), key=lambda tensor: tensor[2])]
        files = dict.fromkeys(file for file, *_ in chosen)
        return Sample(tuple(files), frozenset(name for _, name, _ in chosen), sum(bytes_ for *_, bytes_ in chosen))


def checkpoint_of(paths: Sequence[str]) -> Checkpoint:
    """The tensors of files, by their headers."""
    tensors = []
    for path, file in zip(paths, open_files(paths), strict=True):
        for name, dtype, _, begin, end in file.tensors():
            if dtype in TORCH_DTYPES:
                tensors.append((os.fspath(path), name, end - begin))
    return Checkpoint(tuple(tensors), sum(bytes_ for *_, bytes_ in tensors))


class Loads:
    """Loads a sample, timed."""

    def __init__(self, sample: Sample, device: torch.device) -> None:
        self.sample, self.device = sample, device

    def seconds(self, candidate: Candidate, state: str, limit_s: float) -> float | None:
        """Seconds of one load with these settings; None where it was cut off after ``limit_s``.

        Args:
            candidate: the settings.
            state: of the page cache: ``"cold"`` puts the files out of it first, which is not timed; ``"warm"`` leaves
                it as it is.
            limit_s: seconds after which the load is stopped.

        Raises:
            NotColdError: the files stay in the page cache.
        """
        self._give_up_spare_memory()
        if state == "cold":
            why = evict(self.sample.files)
            if why is not None:
                raise NotColdError(why)
        with settings.override(**dict(candidate.changes)):
            return self._timed(limit_s)

    def _give_up_spare_memory(self) -> None:
        """Have nothing kept of earlier loads: every one begins as a process's first, whatever was measured before it.

        What a load keeps while it runs is the same for all candidates: ``spare_bytes`` is none of what they change.
        """
        if self.device.type == "cpu":
            # The limit is the process's, and holds from the beginning of a load, here one of nothing.
            with settings.override(spare_bytes=0):
                safetensors_weights_iterator(
                    [self.sample.files[0]],
                    device=self.device,
                    strategy="independent",
                    names=frozenset(),
                    show_progress=False,
                ).close()

    def fill_page_cache(self, limit_s: float) -> bool:
        """Load once through the page cache, for warm loads to find it there; False if it was cut off."""
        with settings.override(read="buffered"):
            return self._timed(limit_s) is not None

    def _timed(self, limit_s: float) -> float | None:
        begin = time.perf_counter()
        weights = safetensors_weights_iterator(
            list(self.sample.files),
            device=self.device,
            strategy="independent",
            names=self.sample.names,
            show_progress=False,
        )
        # Another thread's close() ends a next() that waits for storage.
        stop = threading.Timer(max(0.0, limit_s - (time.perf_counter() - begin)), weights.close)
        stop.daemon = True  # Ctrl-C may come while it starts: nobody waits for it then
        try:
            stop.start()
            count, kept = 0, []
            for _, tensor in weights:
                count += 1
                if self.device.type == "cpu":
                    touch(tensor)
                else:
                    kept.append(tensor)
            if kept:
                torch.accelerator.synchronize(self.device)
            took = time.perf_counter() - begin
        finally:
            stop.cancel()
            weights.close()
        return took if count == len(self.sample.names) else None
