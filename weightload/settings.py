"""Every knob of a load: its unit, its default, its environment variable, and a scoped override.

SETTINGS.md is made from this file (``weightload settings --markdown``).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, TypeVar, cast

from weightload import _C
from weightload.cpus import usable_cpus
from weightload.handlers import pass_on

MIB = 1 << 20
READ_MODES = ("auto", "buffered", "direct")
MOST_DEFAULT_THREADS = 16
LARGEST = (1 << 63) - 1  # of any number
SLOTS_OF_CACHED = 32  # of cached_pinned_bytes: two for each of as many threads as are usual
LEAST_COLD_THREADS = 8  # some wait for the storage while others copy; beside other readers, each gets its turn

CPU = "CPU"
ACCELERATORS = "accelerators"
BOTH = f"{CPU}, {ACCELERATORS}"

_Value = TypeVar("_Value", int, str)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _knob(
    default: _Value, *, unit: str, loads: str, what: str, change: str, least: int = 4096, multiple: int = 1
) -> _Value:
    """A field of Settings, with what its page says of it.

    Args:
        default: the value without an environment variable and without an override.
        unit: what a number counts.
        loads: which loads it is for: to the CPU, to accelerators.
        what: what it is.
        change: when to change it, and what that costs.
        least: the least number allowed.
        multiple: numbers must be multiples of it.
    """
    about = {"unit": unit, "loads": loads, "what": what, "change": change, "least": least, "multiple": multiple}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one load. The environment variable of a field is ``WEIGHTLOAD_`` and its name in capitals."""

    threads: int = _knob(
        0,
        unit="threads",
        loads=BOTH,
        least=0,
        what="Reading threads. 0: as many as the process may use CPUs (affinity and cgroup quota), at most "
        f"{MOST_DEFAULT_THREADS}; on the CPU at least {LEAST_COLD_THREADS} for files that are not in the page cache.",
        change="More where the storage answers late but to many at once (network file systems, striped disks); fewer "
        "where other work of the process needs the CPUs, or where one disk slows down under several readers.",
    )
    window_bytes: int = _knob(
        256 * MIB,
        unit="bytes",
        loads=CPU,
        what="How far reading may run ahead of the consumer: bounds the memory that no tensor owns yet, and what an "
        "early exit has read in vain.",
        change="Larger where the consumer works in bursts (quantises a large tensor, say) and storage should not "
        "stand still meanwhile; smaller where memory is short.",
    )
    task_bytes: int = _knob(
        8 * MIB,
        unit="bytes",
        loads=CPU,
        what="One read of one thread.",
        change="Smaller reads start the consumer sooner and share small loads among more threads; larger ones cost "
        "fewer system calls, which pays where each request is a round trip over a network.",
    )
    block_bytes: int = _knob(
        64 * MIB,
        unit="bytes",
        loads=f"{CPU} (private memory)",
        what="Private memory that neighbouring small tensors share; a larger tensor has its own. Also what ranks "
        "that share the reading send in one piece. Mapped tensors (the default on the CPU) are in no block.",
        change="Smaller where single small tensors are kept and the rest is dropped: a block lives as long as any of "
        "its tensors. Ranks that share a load must have the same value.",
    )
    spare_bytes: int = _knob(
        4096 * MIB,
        unit="bytes",
        loads=f"{CPU} (private memory)",
        least=0,
        what="How much private memory, at most, the process keeps for its next loads when no tensor uses it any more: "
        "fresh memory costs as much as the copy into it. The kernel takes it back as soon as anybody needs memory "
        "(MADV_FREE); until then it counts in the process's resident size. 0 keeps none. The process has one limit, "
        "that of the CPU load begun last; what is kept above it is given up when that load begins. Nothing is kept "
        "where address space is limited (ulimit -v, ulimit -d, vm.overcommit_memory=2). weightload.release_memory() "
        "gives all back at once.",
        change="0 where resident sizes are watched and nothing is loaded twice; larger where larger models take turns.",
    )
    pinned_bytes: int = _knob(
        256 * MIB,
        unit="bytes",
        loads=ACCELERATORS,
        what="Page-locked host memory at most, in slots that are filled and copied from in turn.",
        change="Larger where stats() shows that the threads wait for slots although reading is the "
        "slower side; smaller where many processes share the memory or its limit (ulimit -l).",
    )
    cached_pinned_bytes: int = _knob(
        64 * MIB,
        unit="bytes",
        loads=ACCELERATORS,
        what="So much of pinned_bytes is enough where the files look to be in the page cache, in slots of a "
        f"{SLOTS_OF_CACHED}nd of it or less, 256 KiB at least: what the threads have copied into a slot should still "
        "be in the processor's caches when the device fetches it. With more, the machine's memory is the limit, and "
        "not the link to the device. The rest is used where the device is late, having other work before the copies.",
        change="Smaller where the processor's caches are; larger where a measurement says so, with many threads say. "
        "That threads wait for slots is as it should be here: the link is the limit then. As much as pinned_bytes: no "
        "difference is made.",
    )
    slot_bytes: int = _knob(
        8 * MIB,
        unit="bytes",
        loads=ACCELERATORS,
        multiple=4096,
        what="One slot: one read and one copy. torch locks the next power of two. Small loads, and files in the page "
        "cache (cached_pinned_bytes), take smaller slots.",
        change="Smaller slots start the first copy sooner; larger ones cost fewer calls. pinned_bytes must hold one.",
    )
    device_block_bytes: int = _knob(
        128 * MIB,
        unit="bytes",
        loads=ACCELERATORS,
        what="Device memory that neighbouring tensors share; a larger tensor has its own. Also how far reading may "
        "run ahead of the consumer, and what ranks that share the reading send in one piece.",
        change="Smaller where device memory is nearly full, or single small tensors are kept and the rest is dropped. "
        "Allocators round sizes: 128 MiB keeps that below 1 %. Ranks that share a load must have the same value.",
    )
    read: str = _knob(
        "auto",
        unit=", ".join(f'"{mode}"' for mode in READ_MODES),
        loads=f"{CPU} (private memory and parameters), {ACCELERATORS}",
        what='"buffered" reads through the page cache, "direct" past it (O_DIRECT), "auto" range by range: what is in '
        "the page cache from there, the rest on local disks whichever way has been faster, but through the page cache "
        "where several ranks of a node load independently. Ranks that share a load to the CPU always read through it, "
        "as does private memory before Linux 5.18 (6.5 with pages beyond 4 KiB), which could lose what a disk wrote.",
        change='"direct" where loads are always cold and the page cache belongs to others; "buffered" where the files '
        "are soon loaded again, by this process or another one.",
    )

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

    def read_mode(self, alone: bool) -> str:
        """The setting; in place of "auto" "buffered" where other ranks of this node read the same files by themselves.

        They find in the page cache what this one has read.
        """
        return self.read if alone or self.read != "auto" else "buffered"

    def thread_count(self, cold: bool = False) -> int:
        """Threads to start: the setting, or the default of this process now, also for files that are to be read."""
        least = LEAST_COLD_THREADS if cold else 1
        return self.threads or min(max(usable_cpus(), least), MOST_DEFAULT_THREADS)


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
