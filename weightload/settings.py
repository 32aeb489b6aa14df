"""Every knob of a load: its unit, its default, its environment variable, and a scoped override.

SETTINGS.md says what each is for, and when to change it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable
from typing import Any, Literal, TypeVar, cast

from weightload import _C
from weightload._base.cpus import usable_cpus
from weightload._base.handlers import pass_on

__all__ = ["NAMES", "Settings", "current", "origins", "override", "variable"]

MIB = 1 << 20
READ_MODES = ("auto", "buffered", "direct")
MOST_DEFAULT_THREADS = 16
REQUESTS_AT_FIRST = 16
MOST_REQUESTS = 64  # at once, of the default
LARGEST = (1 << 63) - 1  # of any number
SLOTS_OF_CACHED = 32  # of cached_pinned_bytes: two for each of as many threads as are usual
LEAST_COLD_THREADS = 8  # some wait for the storage while others copy; beside other readers, each gets its turn

CPU = "CPU"
ACCELERATORS = "accelerators"
BOTH = f"{CPU}, {ACCELERATORS}"
PRIVATE = f"{CPU} (private memory)"

_Value = TypeVar("_Value", int, str)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _knob(default: _Value, *, unit: str, loads: str, least: int = 4096, multiple: int = 1) -> _Value:
    """A field of Settings.

    Args:
        default: the value without an environment variable and without an override.
        unit: what a number counts.
        loads: which loads it is for: to the CPU, to accelerators.
        least: the least number allowed.
        multiple: numbers must be multiples of it.
    """
    about = {"unit": unit, "loads": loads, "least": least, "multiple": multiple}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one load. The environment variable of a field is ``WEIGHTLOAD_`` and its name in capitals."""

    threads: int = _knob(0, unit="threads", loads=BOTH, least=0)
    """Reading threads; 0: ``thread_count``."""
    window_bytes: int = _knob(256 * MIB, unit="bytes", loads=CPU)
    """How far reading may run ahead of the consumer."""
    task_bytes: int = _knob(8 * MIB, unit="bytes", loads=CPU)
    """One read of one thread."""
    block_bytes: int = _knob(64 * MIB, unit="bytes", loads=PRIVATE)
    """Memory that neighbouring small tensors share, and what ranks send in one piece; equal on all ranks of a load."""
    spare_bytes: int = _knob(4096 * MIB, unit="bytes", loads=PRIVATE, least=0)
    """Memory that the process keeps at most for its next loads; one limit, that of the CPU load begun last."""
    pinned_bytes: int = _knob(256 * MIB, unit="bytes", loads=ACCELERATORS)
    """Page-locked memory at most."""
    cached_pinned_bytes: int = _knob(64 * MIB, unit="bytes", loads=ACCELERATORS)
    """So much of it where the files look to be in the page cache, in slots of 1 / SLOTS_OF_CACHED of this or less."""
    slot_bytes: int = _knob(8 * MIB, unit="bytes", loads=ACCELERATORS, multiple=4096)
    """One slot of it: one read and one copy."""
    device_block_bytes: int = _knob(128 * MIB, unit="bytes", loads=ACCELERATORS)
    """Device memory that neighbouring tensors share, and what ranks send in one piece; equal on all ranks of a load."""
    read: str = _knob(
        "auto",
        unit=", ".join(f'"{mode}"' for mode in READ_MODES),
        loads=f"{CPU} (private memory and parameters), {ACCELERATORS}",
    )
    """Through the page cache, past it, or range by range whichever is better."""

    requests: int = _knob(0, unit="requests", loads=f"{BOTH}, from servers", least=0)
    """Ranges that are asked of servers at once, each by a thread that waits for it; 0 for as many as pay."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least, multiple = getattr(self, field.name), field.metadata["least"], field.metadata["multiple"]
            if field.name == "read":
                if value not in READ_MODES:
                    raise ValueError(f"weightload setting read={value!r}: must be one of {', '.join(READ_MODES)}")
            elif not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
                raise ValueError(
                    f"weightload setting {field.name}={value!r}: must be a whole number from {least} to {LARGEST}"
                )
            elif value % multiple:
                raise ValueError(f"weightload setting {field.name}={value}: must be a multiple of {multiple}")
        if self.pinned_bytes < self.slot_bytes:
            raise ValueError(
                f"weightload setting pinned_bytes={self.pinned_bytes}: must hold a slot of {self.slot_bytes} bytes"
            )

    def read_mode(self, readers: Readers) -> str:
        """A ``_C.ReadMode``: the setting, or for "auto" what suits those that read the same files on this node.

        Ranks that want the same find in the page cache what one of them has read. What nobody else wants need not be
        there.
        """
        if self.read != "auto":
            return self.read
        return {"one": "auto", "same": "buffered", "apart": "uncached"}[readers]

    def thread_count(self, cold: bool = False) -> int:
        """Threads to start: the setting, or the default of this process now, also for files that are to be read."""
        least = LEAST_COLD_THREADS if cold else 1
        return self.threads or min(max(usable_cpus(), least), MOST_DEFAULT_THREADS)

    def threads_of(self, files: Iterable[_C.CheckpointFile], cold: bool = False) -> int:
        """Threads to start for a load of these files: as many as requests at once, where a server has any of them."""
        return self.requests or MOST_REQUESTS if any(file.is_remote for file in files) else self.thread_count(cold)

    def threads_at_first(self, files: Iterable[_C.CheckpointFile]) -> int:
        """How many of them begin; more as long as they bring more. 0: all."""
        return REQUESTS_AT_FIRST if not self.requests and any(file.is_remote for file in files) else 0


Readers = Literal["one", "same", "apart"]
"""Processes of this node that read by themselves: this one alone, several the same files, or each other parts."""

NAMES = tuple(field.name for field in dataclasses.fields(Settings))

_overrides: contextvars.ContextVar[tuple[dict[str, Any], ...]] = contextvars.ContextVar("weightload_settings")


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"WEIGHTLOAD_{name.upper()}"


def _from_environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in NAMES:
        text = os.environ.get(variable(name))
        if text:
            try:
                values[name] = text if name == "read" else int(text)
            except ValueError as failed:
                pass_on(failed)
                raise ValueError(f"{variable(name)}={text!r}: must be a whole number") from None
    return values


def _overridden() -> dict[str, Any]:
    return {name: value for values in _overrides.get(()) for name, value in values.items()}


def current() -> Settings:
    """The settings in force: scoped overrides, else environment variables, else defaults.

    Raises:
        ValueError: a value that is not allowed, with the setting or the environment variable that has it.
    """
    return Settings(**{**_from_environment(), **_overridden()})


def origins() -> dict[str, str]:
    """Where each setting in force comes from: ``"override"``, ``"environment"`` or ``"default"``."""
    overrides, environment = _overridden(), _from_environment()
    return {
        name: "override" if name in overrides else "environment" if name in environment else "default" for name in NAMES
    }


def _is_generator_function(function: object) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


class override(_C.ScopedVariable, contextlib.ContextDecorator):
    """Settings for the loads begun in a ``with`` block, or in a function that it decorates (in this thread or task).

    An exception at any moment, Ctrl-C's included, leaves the settings as they were outside. Blocks may end in any
    order, as those of generators do. The decorated function may be a coroutine (``async def``).

    Raises:
        TypeError: a name that is no setting, or a decorated generator, whose body runs later, between what its caller
            does. Write a ``with`` block in it instead.
    """

    def __init__(self, **values: int | str) -> None:
        unknown = set(values) - set(NAMES)
        if unknown:
            raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
        self._values = values
        super().__init__(_overrides, values)

    def __call__(self, function: _Function) -> _Function:
        if any(map(_is_generator_function, (function, getattr(function, "__func__", None), type(function).__call__))):
            raise TypeError(f"settings.override cannot decorate the generator {function!r}; use a with block in it")

        @functools.wraps(function)
        def overridden(*arguments: Any, **named: Any) -> Any:
            with self._recreate_cm():
                result = function(*arguments, **named)
            if isinstance(result, (Generator, AsyncGenerator)):
                raise TypeError(f"settings.override cannot decorate {function!r}: it returns a generator")
            return self._awaited(result) if inspect.iscoroutine(result) else result

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*arguments: Any, **named: Any) -> Any:
                return await overridden(*arguments, **named)

            return cast(_Function, awaited)
        return cast(_Function, overridden)

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        with self._recreate_cm():
            return await coroutine

    def _recreate_cm(self) -> override:
        return override(**self._values)
