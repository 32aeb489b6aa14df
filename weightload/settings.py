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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "threads" else 4096
            if not isinstance(value, int) or value < least:
                raise ValueError(f"weightload setting {field.name}={value!r}: must be a whole number from {least}")

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
                values[field.name] = int(text)
            except ValueError:
                raise ValueError(f"WEIGHTLOAD_{field.name.upper()}={text!r}: must be a whole number") from None
    values.update(_overrides.get({}))
    return Settings(**values)


@contextlib.contextmanager
def override(**values: int) -> Iterator[None]:
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
