"""safetensors_weights_iterator: the drop-in for the iterators that engines load their weights with."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from weightload import _C, progress, settings
from weightload.distributed import require_independent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Path = str | os.PathLike[str]
Names = Collection[str] | Callable[[str], bool]
Backend = Literal["mmap", "pread"]


class WeightIterator(_C.HostLoader):
    """Iterator of ``(name, tensor)``; also a context manager. Tensors stay valid after it is closed.

    ``total_bytes`` is the size of the selected tensors, ``len()`` their number. Takes over ``files``: the list is
    empty afterwards.
    """

    def __init__(self, files: list[_C.CheckpointFile], names: Names | None, *, backend: str, read_ahead: bool) -> None:
        if backend not in ("mmap", "pread"):
            raise ValueError(f"backend {backend!r}: must be 'mmap' or 'pread'")
        now = settings.current()
        try:
            super().__init__(
                files,
                [select(file, names) for file in files],
                map=backend == "mmap",
                read_ahead=read_ahead,
                threads=now.thread_count(),
                window_bytes=now.window_bytes,
                task_bytes=now.task_bytes,
                block_bytes=now.block_bytes,
            )
        finally:
            # The core holds them now; an exception's traceback would keep them open through this frame.
            files.clear()
        _live.add(self)

    def __enter__(self) -> WeightIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_live: weakref.WeakSet[WeightIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Joins the threads of loads that nobody finished, before the interpreter goes away under them."""
    for weights in list(_live):
        weights.close()


def select(file: _C.CheckpointFile, names: Names | None) -> list[int]:
    """Numbers of the file's tensors that ``names`` (a collection or a predicate; None for all) picks."""
    if names is None:
        return list(range(len(file)))
    if isinstance(names, str):
        raise TypeError("names must be a collection of tensor names or a predicate, not one string")
    picked = names if callable(names) else set(names).__contains__
    return [number for number, name in enumerate(file.names()) if picked(name)]


def open_files(paths: Sequence[Path]) -> list[_C.CheckpointFile]:
    """Open checkpoint files and validate their headers, in parallel."""
    return _C.open_files([os.fsencode(path) for path in paths], settings.current().thread_count())


def require_cpu(device: torch.device | str | int | None) -> None:
    """Accept the CPU, which is the only target so far.

    Raises:
        NotImplementedError: for any other device.
    """
    target = torch.device(device) if device is not None else torch.device("cpu")
    if target.type != "cpu":
        raise NotImplementedError(f"weightload cannot load to {target} yet: only the CPU is implemented")


def _default_device(to_cpu: bool, device: torch.device | str | int | None) -> torch.device:
    if to_cpu:
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"to_cpu=True contradicts device={device!r}")
        return torch.device("cpu")
    if device is not None:
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def safetensors_weights_iterator(
    hf_weights_files: Sequence[Path] | Path,
    to_cpu: bool = False,
    broadcast: bool = True,
    async_broadcast: bool = False,
    *,
    device: torch.device | str | int | None = None,
    group: ProcessGroup | None = None,
    strategy: str = "auto",
    names: Names | None = None,
    show_progress: bool | None = None,
    backend: Backend = "mmap",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the tensors of safetensors files: files in the given order, tensors by offset.

    Headers are opened and checked, and reading starts, before this returns. A yielded tensor may be used at once,
    and kept: its memory is its own or shared with neighbours that live as long as any of them. Leaving the loop
    early, or ``close()``, stops the reading.

    Args:
        hf_weights_files: paths of the files (one path is taken as one file).
        to_cpu: yield CPU tensors and never communicate.
        broadcast: with more than one rank, one rank reads and the others receive (not implemented yet).
        async_broadcast: accepted; a tensor is complete when it is yielded in any case.
        device: where to put the tensors; default: the accelerator of this process (``LOCAL_RANK``), or the CPU
            where there is none. Only the CPU is implemented.
        group: the ranks that share the reading; default: all.
        strategy: ``"auto"``, ``"independent"``, ``"broadcast"`` or ``"striped"``.
        names: a collection of tensor names, or a predicate on names: only these are yielded and read.
        show_progress: a tqdm bar in bytes, on rank 0. Default: where stderr is a terminal, on loads longer than a
            second.
        backend: ``"mmap"``: copy-on-write views of the mapped file, as in safetensors. ``"pread"``: private
            memory, which later changes of the file cannot reach.

    Yields:
        ``(name, tensor)``. The tensor has the shape and dtype of the header (F4 as ``torch.float4_e2m1fn_x2``,
        whose last dimension counts pairs), is contiguous, and aligned to its dtype.

    Raises:
        FileNotFoundError: a file is missing (other errors of ``open()`` likewise).
        HeaderError: a file breaks a rule of the format; the subclass names the rule.
        ReadError: bytes could not be read; raised when the iteration reaches the first tensor they belong to.
        TensorError: torch lacks a tensor's dtype; raised when the iteration reaches it.
        NotImplementedError: a device other than the CPU, or ranks that share the reading.
    """
    target = _default_device(to_cpu, device)
    if not to_cpu:
        require_independent(strategy, broadcast, group)
    require_cpu(target)
    paths = [hf_weights_files] if isinstance(hf_weights_files, (str, os.PathLike)) else list(hf_weights_files)
    weights = WeightIterator(open_files(paths), names, backend=backend, read_ahead=True)
    if progress.wanted(show_progress):
        return progress.with_bar(weights, always=show_progress is True)
    return weights


__all__ = ["WeightIterator", "safetensors_weights_iterator"]
