"""
The C++ core of weightload. Private: use the weightload package.
"""

from __future__ import annotations

import collections.abc
import typing

import torch
import typing_extensions

__all__: list[str] = [
    "CheckpointFile",
    "Connection",
    "DeviceLoader",
    "DeviceTarget",
    "Group",
    "HostLoader",
    "Prefetch",
    "ReadMode",
    "ScopedVariable",
    "Strategy",
    "TensorReader",
    "Verdict",
    "arm_fault",
    "close_later",
    "dense_memory",
    "disarm_fault",
    "enter_thread_of_loads",
    "finish",
    "from_bytes",
    "in_thread_of_loads",
    "is_exiting",
    "keep_memory",
    "leave_interpreter",
    "measure_page_costs",
    "open_files",
    "open_source",
    "plainly",
    "reads_since_armed",
    "refuse_threads",
    "release_memory",
    "repeated_tensors",
    "resident_bytes",
    "selection_digest",
    "set_page_costs",
]

class Connection:
    """
    A connection by TCP that the core takes bytes from.
    """
    def __init__(self, address: str, port: int) -> None:
        """
        Begins to connect to a numeric address, and waits for nothing.
        """
    def is_quiet(self) -> bool:
        """
        Whether it is open, and nothing has come that nobody has asked for.
        """

class CheckpointFile:
    """
    An open safetensors file with its validated header.
    """
    def __len__(self) -> int: ...
    def also_read_by_others(self) -> CheckpointFile:
        """
        The same open file, which a load reads through the page cache, since others do.
        """
    def bytes_of(self, tensors: collections.abc.Sequence[int]) -> int:
        """
        Bytes of the tensors with these numbers.
        """
    def header_digest(self) -> int:
        """
        A 64-bit digest of the header as it is in the file; reads it again.
        """
    def names(self) -> list[str]:
        """
        tensor names by offset
        """
    def read_all(self) -> int:
        """
        Reads every byte once and returns their number.
        """
    def read_into(self, offset: int, memory: typing_extensions.Buffer) -> None:
        """
        Fills a buffer with bytes from `offset` on.
        """
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """
        (name, dtype, shape, begin, end) by offset; begin and end count from the file's start
        """
    def with_tap(self, tap: typing.Any) -> CheckpointFile:
        """
        The same open file, of which a load tells the tap what it reads; see bindings/byte_tap.h.
        """
    def with_tensors(
        self, numbers: collections.abc.Sequence[int], names: collections.abc.Sequence[str] | None = None
    ) -> CheckpointFile:
        """
        The same open file with some of its tensors; `names`: what they are called there.
        """
    @property
    def data_begin(self) -> int: ...
    @property
    def is_remote(self) -> bool:
        """
        whether a server has it
        """
    @property
    def metadata(self) -> dict[str, str] | None:
        """
        dict of str to str, or None where the header has none
        """
    @property
    def open_s(self) -> float:
        """
        what opening took, the header's reading and parsing included
        """
    @property
    def parse_s(self) -> float:
        """
        of this, the parsing
        """
    @property
    def path(self) -> str: ...
    @property
    def remote(self) -> typing.Any:
        """
        the object behind open_source(), or None
        """
    @property
    def size(self) -> int:
        """
        bytes, header included
        """

class DeviceTarget:
    """
    An accelerator to load to; page-locking of its ring begins with construction.
    """
    def __init__(self, device: str, slots: int, slot_bytes: int, enough: int, cold: tuple[int, int] | None) -> None:
        """
        ``slots``: at most; more than ``enough`` only where the device is late. ``cold``: slots and their bytes in place of these, where what is to be read is not in the page cache.
        """
    def close(self) -> None:
        """
        Gives the ring back, for a target that no loader was made with.
        """

class Strategy:
    """
    Members:

      independent

      broadcast

      striped
    """

    __members__: typing.ClassVar[dict[str, Strategy]]
    broadcast: typing.ClassVar[Strategy]
    independent: typing.ClassVar[Strategy]
    striped: typing.ClassVar[Strategy]
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: int) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Verdict:
    """
    The ranks' last meeting of a load: what each of them found out by itself, all hear.
    """
    def close(self) -> None:
        """
        Leaves: the other ranks hear it.
        """
    def conclude(self, kind: str, message: bytes, path: bytes) -> None:
        """
        Says how it went here (`kind`: empty for well, checksum, read or another), and raises the error of the lowest rank that has failed.
        """

class Group:
    """
    One load's share of a torch.distributed.ProcessGroup. A loader takes it over; close() leaves.
    """
    def __init__(
        self, group: typing.Any, target: DeviceTarget | None, device: str, strategy: Strategy, load: str
    ) -> None: ...
    def agree(
        self, record: bytes, more: bool, compared: int | None = None, parting: bytes = b"", verdict: bool = False
    ) -> list[bytes]:
        """
        The records of all ranks, which must have the same size. The first byte of those that agree is 1. They agree if `compared` bytes (all by default) are equal. With `parting`, all must be; where only those are, the ranks meet once more, and a rank that was interrupted gives them that. `verdict`: whether the ranks that have agreed meet behind the load.
        """
    def close(self) -> None: ...
    def let_go(self) -> None:
        """
        The load has no more to say, but in the verdict: it is over for this.
        """
    def tell(self, record: bytes) -> None:
        """
        agree(record), without waiting for the others, then close().
        """
    def verdict(self) -> Verdict:
        """
        That meeting, for when the load is over: who has it closes it.
        """

class ReadMode:
    """
    Members:

      auto

      buffered

      direct

      uncached
    """

    __members__: typing.ClassVar[dict[str, ReadMode]]
    auto: typing.ClassVar[ReadMode]
    buffered: typing.ClassVar[ReadMode]
    direct: typing.ClassVar[ReadMode]
    uncached: typing.ClassVar[ReadMode]
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: int) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class HostLoader:
    """
    Iterator of (name, tensor) over host memory.
    """
    def __init__(
        self,
        files: list[CheckpointFile],
        selection: collections.abc.Sequence[collections.abc.Sequence[int]],
        places: list[torch.Tensor | None],
        group: Group | None,
        parts: collections.abc.Sequence[collections.abc.Sequence[collections.abc.Sequence[tuple[int, int]]] | None],
        *,
        map: bool,
        must_map: bool,
        read_ahead: bool,
        threads: int,
        cold_threads: int,
        threads_at_first: int,
        window_bytes: int,
        task_bytes: int,
        block_bytes: int,
        read: ReadMode,
    ) -> None: ...
    def __iter__(self) -> typing_extensions.Self: ...
    def __len__(self) -> int: ...
    def __next__(self) -> tuple[str, torch.Tensor]: ...
    def close(self) -> None:
        """
        Stops and joins the reading threads and lets go of the files.
        """
    def counts(self) -> dict[str, typing.Any]:
        """
        What the load has counted so far; weightload/_base/load_stats.py makes sense of it.
        """
    def tell_ranks_of(self, other: HostLoader) -> None:
        """
        Has the ranks that share another load hear of an error of this one, when that one is closed.
        """
    @property
    def total_bytes(self) -> int:
        """
        bytes of the selected tensors
        """

class DeviceLoader:
    """
    Iterator of (name, tensor) over an accelerator's memory; None in place of tensors that were read in place.
    """
    def __init__(
        self,
        target: DeviceTarget,
        files: list[CheckpointFile],
        selection: collections.abc.Sequence[collections.abc.Sequence[int]],
        places: list[torch.Tensor | None],
        group: Group | None,
        parts: collections.abc.Sequence[collections.abc.Sequence[collections.abc.Sequence[tuple[int, int]]] | None],
        *,
        threads: int,
        threads_at_first: int,
        block_bytes: int,
        window_bytes: int,
        read: ReadMode,
    ) -> None: ...
    def __iter__(self) -> typing_extensions.Self: ...
    def __len__(self) -> int: ...
    def __next__(self) -> tuple[str, torch.Tensor]: ...
    def close(self) -> None:
        """
        Stops and joins the reading threads and lets go of the files.
        """
    def counts(self) -> dict[str, typing.Any]:
        """
        What the load has counted so far; weightload/_base/load_stats.py makes sense of it.
        """
    def device_counts(self) -> dict[str, typing.Any]:
        """
        What the ring and the side stream have done so far, beside counts().
        """
    def tell_ranks_of(self, other: DeviceLoader) -> None:
        """
        Has the ranks that share another load hear of an error of this one, when that one is closed.
        """
    @property
    def total_bytes(self) -> int:
        """
        bytes of the selected tensors
        """

class Prefetch:
    """
    Tensors of a load, each of which is handed out once.
    """
    def __init__(
        self, weights: typing.Any, names: collections.abc.Sequence[str], current_stream: typing.Any
    ) -> None: ...
    def __iter__(self) -> typing_extensions.Self: ...
    def __len__(self) -> int: ...
    def __next__(self) -> tuple[str, torch.Tensor]: ...
    def close(self) -> None: ...
    def names(self) -> list[str]:
        """
        All names, taken or not, in the order in which they load.
        """
    def take(self, name: str) -> typing.Any: ...

class ScopedVariable:
    """
    A context manager that adds a dictionary to the tuple of a context variable.
    """
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...
    def __init__(self, variable: typing.Any, values: dict[str, typing.Any]) -> None: ...

class TensorReader:
    """
    Single tensors of a file, and rows of them, on the CPU.
    """

    LEAST_FOR_THREADS: typing.ClassVar[int] = 8388608
    def __init__(self, file: CheckpointFile) -> None: ...
    def can_map(self, tensor: int) -> bool: ...
    def find(self, name: typing.Any) -> int | None:
        """
        A tensor's number, or None.
        """
    def first_view(
        self, tensor: int, rows: tuple[int, int] | None, needed: collections.abc.Sequence[tuple[int, int]] | None = None
    ) -> typing.Any:
        """
        A view of the mapped file, all of the tensor or rows of it; None if somebody has been given any of it. `needed`: (begin, end) of the rows that will be looked at, where they are not all.
        """
    def get(self, name: typing.Any, map: bool) -> typing.Any:
        """
        A view of the mapped file (map=True), or private memory; the tensor's number where threads should load it; None without such a name.
        """
    def info(self, tensor: int) -> tuple[str, list[int], int, int]:
        """
        (dtype, shape, begin, end); bytes count from the file's start.
        """
    def is_at_hand(self, begin: int, end: int) -> bool:
        """
        Whether these bytes can be looked at in the mapping without being brought in first.
        """
    def read(self, tensor: int) -> typing.Any:
        """
        A tensor in private memory, read in this thread.
        """
    def read_rows(self, tensor: int, rows: collections.abc.Sequence[tuple[int, int]]) -> typing.Any:
        """
        (begin, end) of rows, one behind the other, in private memory, read in this thread.
        """
    def with_parts(self, parts: collections.abc.Sequence[tuple[int, tuple[int, int] | None]]) -> CheckpointFile:
        """
        The file with these (number, rows) only, by offset; rows are (begin, end), or None for all.
        """
    @property
    def file(self) -> CheckpointFile: ...

def arm_fault(
    fault: str, first: int = 0, count: int = 1, error_number: int = 0, delay_ms: int = 0, statuses: bool = False
) -> None:
    """
    For tests: makes `count` reads from the `first`-th on (counted from 0 since this call) suffer the fault: error, interrupt, short_read, end_of_file or delay. Or `statuses`: what asks for a file's.
    """

def close_later(object: typing.Any) -> None:
    """
    Has another thread call close() of an object.
    """

def dense_memory(tensor: torch.Tensor) -> tuple[int, int] | None:
    """
    Addresses of the begin and the end of a plain tensor's memory, (0, 0) where it has no elements; None if it is not dense and contiguous, or is a wrapper.
    """

def disarm_fault() -> None: ...
def enter_thread_of_loads() -> None:
    """
    This thread is one that loads wait for: what is closed in it is closed later, by another.
    """

def finish(self: typing.Any) -> None:
    """
    As the __del__ of a class: close(), whose exceptions reach the caller.
    """

def from_bytes(data: bytes) -> CheckpointFile: ...
def in_thread_of_loads() -> bool:
    """
    Whether this thread is one of those.
    """

def is_exiting() -> bool:
    """
    Whether the exit hook has begun.
    """

def keep_memory(most: int) -> None:
    """
    From now on the process keeps at most so many bytes for later loads.
    """

def leave_interpreter() -> None:
    """
    The exit hook: from now on no load begins, and those that are under way are stopped and joined.
    """

def measure_page_costs() -> None: ...
def open_files(paths: collections.abc.Sequence[bytes], threads: int) -> list[CheckpointFile]: ...
def open_source(source: typing.Any, path: str, size: int) -> CheckpointFile:
    """
    What a server has, by way of an object with ask(); see bindings/remote_source.h.
    """

def plainly(function: typing.Any, arguments: tuple[typing.Any, ...], options: dict[str, typing.Any]) -> typing.Any:
    """
    function(*arguments, **options), with torch as it is in a new thread: without the caller's modes.
    """

def reads_since_armed() -> int:
    """
    Or statuses.
    """

def refuse_threads(refuse: bool) -> None:
    """
    For tests: as if the system had no thread to give.
    """

def release_memory() -> int:
    """
    Gives the memory that is kept for later loads back to the system, and returns its bytes.
    """

def repeated_tensors(
    files: collections.abc.Sequence[CheckpointFile],
    selection: collections.abc.Sequence[collections.abc.Sequence[int]] | None,
) -> list[tuple[str, list[tuple[int, int]]]]:
    """
    Of every name that the selection (None: all tensors) has more than once: the name, and the numbers of its files and of its tensors in them.
    """

def resident_bytes(path: bytes) -> int | None:
    """
    Bytes of the file in the page cache, or None where the kernel does not tell.
    """

def selection_digest(
    files: collections.abc.Sequence[CheckpointFile], selection: collections.abc.Sequence[collections.abc.Sequence[int]]
) -> int:
    """
    A 64-bit digest of which tensors these are.
    """

def set_page_costs(huge_us: int, single_us: int) -> None:
    """
    For tests: loads take fresh memory of 2 MiB to cost so much in a huge page or in single ones, whatever it does.
    """
