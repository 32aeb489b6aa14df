"""Makes a load's stats of what its loader counts, of how its files were opened, and of when it began."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from weightload import _C
from weightload._base.load_stats import DeviceStats, FileStats, LoadStats, Stage
from weightload._checkpoint.selection import Opening


class Counting:
    """The times that a loader itself does not know. Made when the load begins."""

    def __init__(self) -> None:
        self._begun = time.monotonic()  # the clock that the loaders count by, too
        self._open_seconds = 0.0
        self._parse_seconds = 0.0
        self._header_bytes = 0
        self._paths: list[str] = []
        self.agreement_seconds = 0.0  # of the ranks

    def opened(self, open_them: Opening) -> list[_C.CheckpointFile]:
        """Open the files, and remember how long that took."""
        begin = time.monotonic()
        files = open_them()
        self._open_seconds = time.monotonic() - begin
        self._parse_seconds = sum(file.parse_s for file in files)
        self._header_bytes = sum(file.data_begin for file in files)
        return files

    def loading(self, files: Sequence[_C.CheckpointFile]) -> None:
        """The loader is about to take these files."""
        self._paths = [file.path for file in files]

    def stats(self, counts: dict[str, Any], device: dict[str, Any] | None = None) -> LoadStats:
        """``counts``: the loader's. ``device``: what a loader to an accelerator counts beyond."""
        before = max(0.0, counts["begun_s"] - self._begun)
        lasted, wait, shared = counts["lasted_s"], counts["wait_s"], counts["shared_s"]
        files = [
            FileStats(
                path,
                mapped_bytes=file["mapped_bytes"],
                buffered_bytes=file["buffered_bytes"],
                direct_bytes=file["direct_bytes"],
                seconds=file["read_s"],
                wanted_bytes=file["wanted_bytes"],
                rounded_bytes=file["rounded_bytes"],
            )
            for path, file in zip(self._paths, counts["files"], strict=True)
        ]
        read, threads = sum(file.bytes for file in files), max(1, counts["threads"])
        stages = {
            "open": Stage(self._open_seconds, self._header_bytes),
            "parse": Stage(self._parse_seconds),
            "agreement": Stage(self.agreement_seconds),
            "setup": Stage(max(0.0, before - self._open_seconds - self.agreement_seconds) + counts["made_s"]),
            "read": Stage(sum(file.seconds for file in files), read, threads, counts["reading_s"]),
        }
        if device is not None:
            stages["allocate"] = Stage(device["allocate_s"], threads=threads)
            stages["pin"] = Stage(device["pin_s"], threads=threads)
            stages["pin_wait"] = Stage(device["ring_wait_s"], threads=threads)
            wanted = sum(file.wanted_bytes for file in files)
            stages["copy"] = Stage(device["copy_s"], wanted, threads, counts["reading_s"])
        stages["wait"] = Stage(wait)
        # While ranks share, waiting for the threads is a part of what they do together.
        stages["collective"] = Stage(max(0.0, shared - wait) if shared else 0.0)
        stages["consumer"] = Stage(max(0.0, lasted - counts["made_s"] - max(wait, shared)))
        return LoadStats(
            seconds=before + lasted,
            ended=counts["ended"],
            bytes=counts["tensor_bytes"],
            tensors=counts["tensors"],
            threads=counts["threads"],
            stages={name: stage for name, stage in stages.items() if stage.seconds > 0},
            files=files,
            device=None
            if device is None
            else DeviceStats(**{field.name: device[field.name] for field in fields(DeviceStats)}),
        )
