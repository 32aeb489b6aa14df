"""
The C++ core of weightload. Private: use the weightload package.
"""

from __future__ import annotations

import collections.abc

import torch

__all__: list[str] = [
    "CheckpointFile",
    "HostLoader",
    "arm_fault",
    "disarm_fault",
    "from_bytes",
    "open_files",
    "reads_since_armed",
    "resident_bytes",
]

class CheckpointFile:
    """
    An open safetensors file with its validated header.
    """
    def __len__(self) -> int: ...
    def names(self) -> list[str]:
        """
        tensor names by offset
        """
    def read_all(self) -> int:
        """
        Reads every byte once and returns their number.
        """
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """
        (name, dtype, shape, begin, end) by offset; begin and end count from the file's start
        """
    @property
    def data_begin(self) -> int: ...
    @property
    def metadata(self) -> dict[str, str] | None:
        """
        dict of str to str, or None where the header has none
        """
    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int:
        """
        bytes, header included
        """

class HostLoader:
    """
    Iterator of (name, tensor) over host memory.
    """
    def __init__(
        self,
        files: list[CheckpointFile],
        selection: collections.abc.Sequence[collections.abc.Sequence[int]],
        *,
        map: bool,
        read_ahead: bool,
        threads: int,
        window_bytes: int,
        task_bytes: int,
        block_bytes: int,
    ) -> None: ...
    def __iter__(self) -> HostLoader: ...
    def __len__(self) -> int: ...
    def __next__(self) -> tuple[str, torch.Tensor]: ...
    def close(self) -> None:
        """
        Stops and joins the reading threads and lets go of the files.
        """
    @property
    def total_bytes(self) -> int:
        """
        bytes of the selected tensors
        """

def arm_fault(fault: str, first: int = 0, count: int = 1, error_number: int = 0, delay_ms: int = 0) -> None:
    """
    For tests: makes `count` reads from the `first`-th on (counted from 0 since this call) suffer the fault: error, interrupt, short_read, end_of_file or delay.
    """

def disarm_fault() -> None: ...
def from_bytes(data: bytes) -> CheckpointFile: ...
def open_files(paths: collections.abc.Sequence[bytes], threads: int) -> list[CheckpointFile]: ...
def reads_since_armed() -> int: ...
def resident_bytes(path: bytes) -> int | None:
    """
    Bytes of the file in the page cache, or None where the kernel does not tell.
    """
