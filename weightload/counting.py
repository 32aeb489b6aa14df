"""Makes a load's stats of what its loader counts, of how its files were opened, and of when it began."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from weightload import _C
from weightload.load_stats import DeviceStats, FileStats, LoadStats, Stage

now = time.monotonic  # the clock that the loaders count by, too


class Counting:
    """What a loader does not know of its load. Made before the loader, which takes the files.

    Args:
        files: the open files.
        begun: when the load began, by ``now()``; default: with its loader.
        agreement_seconds: what the ranks' agreement took; 0 where nobody agreed.
    """

    def __init__(self, files: Sequence[_C.CheckpointFile], begun: float | None, agreement_seconds: float) -> None:
        self.paths = [file.path for file in files]
        self.open_seconds = sum(file.open_s for file in files)
        self.parse_seconds = sum(file.parse_s for file in files)
        self.header_bytes = sum(file.data_begin for file in files)
        self.begun = begun
        self.agreement_seconds = agreement_seconds

    def stats(self, counts: dict[str, Any], device: dict[str, Any] | None = None) -> LoadStats:
        """``counts``: the loader's. ``device``: what a loader to an accelerator counts beyond."""
        setup = max(0.0, counts["begun_s"] - self.begun) if self.begun is not None else 0.0
        files = [
            FileStats(path, file["mapped_bytes"], file["buffered_bytes"], file["direct_bytes"], file["read_s"])
            for path, file in zip(self.paths, counts["files"], strict=True)
        ]
        read, threads, wait = sum(file.bytes for file in files), counts["threads"], counts["wait_s"]
        stages = {
            "open": Stage(self.open_seconds, self.header_bytes),
            "parse": Stage(self.parse_seconds, self.header_bytes),
            "agreement": Stage(self.agreement_seconds),
            "read": Stage(sum(file.seconds for file in files), read, max(1, threads)),
        }
        if device is not None:
            stages["allocate"] = Stage(device["allocate_s"], device["block_bytes"], max(1, threads))
            stages["pin_wait"] = Stage(device["ring_wait_s"], 0, max(1, threads))
            stages["copy"] = Stage(device["copy_s"], read, max(1, threads))
        stages["wait"] = Stage(wait)
        stages["collective"] = Stage(max(0.0, counts["shared_s"] - wait) if counts["shared_s"] else 0.0)
        # While ranks share, waiting for the threads is a part of what they do together.
        stages["consumer"] = Stage(max(0.0, counts["lasted_s"] - max(wait, counts["shared_s"])))
        return LoadStats(
            seconds=setup + counts["lasted_s"],
            ended=counts["ended"],
            bytes=counts["tensor_bytes"],
            tensors=counts["tensors"],
            threads=threads,
            stages={name: stage for name, stage in stages.items() if stage.seconds > 0},
            files=files,
            device=None
            if device is None
            else DeviceStats(**{field.name: device[field.name] for field in fields(DeviceStats)}),
        )
