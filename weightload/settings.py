"""Every knob of a load: its unit, its default, its environment variable, and a scoped override."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from weightload.cpus import usable_cpus

MIB = 1 << 20
READ_MODES = ("auto", "buffered", "direct")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one load. The environment variable of a field is ``WEIGHTLOAD_`` and its name in capitals."""

    threads: int = 0
    """Reading threads. 0: as many as the process may use CPUs (affinity and cgroup quota), at most 16."""

    window_bytes: int = 256 * MIB
    """Bytes that reading may run ahead of the consumer: bounds the memory no tensor owns yet, and what an early
    exit has read in vain."""

    task_bytes: int = 8 * MIB
    """Bytes of one read. Smaller reads start the consumer sooner; larger ones cost fewer system calls."""

    block_bytes: int = 64 * MIB
    """Bytes of private memory that neighbouring small tensors share; a larger tensor has its own."""

    pinned_bytes: int = 256 * MIB
    """Accelerators: bytes of page-locked host memory, in slots that are filled and copied from in turn."""

    slot_bytes: int = 8 * MIB
    """Accelerators: bytes of one slot, a multiple of 4096: one read and one copy. Smaller slots start the first copy
    sooner; larger ones cost fewer calls. torch locks the next power of two. Small loads take smaller slots."""

    device_block_bytes: int = 128 * MIB
    """Accelerators: bytes of device memory that neighbouring tensors share; a larger tensor has its own. Also how far
    reading may run ahead of the consumer. Allocators round sizes: 128 MiB keeps that below 1 %."""

    read: str = "auto"
    """Accelerators: "buffered" reads through the page cache, "direct" past it (O_DIRECT), "auto" range by range: what
    is in the page cache from there, the rest directly on local disks."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "threads" else 4096
            if field.name == "read":
                if value not in READ_MODES:
                    raise ValueError(f"weightload setting read={value!r}: must be one of {', '.join(READ_MODES)}")
            elif not isinstance(value, int) or value < least:
                raise ValueError(f"weightload setting {field.name}={value!r}: must be a whole number from {least}")
        if self.slot_bytes % 4096:
            raise ValueError(f"weightload setting slot_bytes={self.slot_bytes}: must be a multiple of 4096")
        if self.pinned_bytes < self.slot_bytes:
            raise ValueError(
                f"weightload setting pinned_bytes={self.pinned_bytes}: must hold a slot of {self.slot_bytes} bytes"
            )

    def thread_count(self) -> int:
        """Threads to start: the setting, or the default of this process now."""
        return self.threads or min(usable_cpus(), 16)


_overrides: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("weightload_settings")


def current() -> Settings:
    """The settings in force: scoped overrides, else environment variables, else defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        text = os.environ.get(f"WEIGHTLOAD_{field.name.upper()}")
        if text:
            try:
                values[field.name] = text if field.name == "read" else int(text)
            except ValueError:
                raise ValueError(f"WEIGHTLOAD_{field.name.upper()}={text!r}: must be a whole number") from None
    values.update(_overrides.get({}))
    return Settings(**values)


@contextlib.contextmanager
def override(**values: int | str) -> Iterator[None]:
    """Settings for the loads begun inside a ``with`` block (in this thread or task).

    Raises:
        TypeError: a name that is no setting.
    """
    unknown = set(values) - {field.name for field in dataclasses.fields(Settings)}
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    token = _overrides.set({**_overrides.get({}), **values})
    try:
        yield
    finally:
        _overrides.reset(token)
