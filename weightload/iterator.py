"""safetensors_weights_iterator: the drop-in for the iterators that engines load their weights with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from weightload import _C, devices, progress, settings
from weightload.device_iterator import DeviceWeightIterator, bytes_of_files, load_to_device
from weightload.distributed import require_independent
from weightload.selection import Names, Path, close_at_exit, open_files, select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Backend = Literal["mmap", "pread"]


class WeightIterator(_C.HostLoader):
    """Iterator of ``(name, tensor)``; also a context manager. Tensors stay valid after it is closed.

    ``total_bytes`` is the size of the selected tensors, ``len()`` their number. Takes over ``files``: the list is
    empty afterwards. ``places`` has CPU memory for some of the tensors, in their order; the iterator then gives
    ``(name, None)`` for them.
    """

    def __init__(
        self,
        files: list[_C.CheckpointFile],
        names: Names | None,
        *,
        backend: str,
        read_ahead: bool,
        places: Sequence[torch.Tensor | None] = (),
    ) -> None:
        now = settings.current()
        try:
            super().__init__(
                files,
                [select(file, names) for file in files],
                list(places),
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
        close_at_exit(self)

    def __enter__(self) -> WeightIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _target(to_cpu: bool, device: devices.Device | None) -> torch.device:
    if not to_cpu:
        return devices.resolve(device)
    if device is not None and (isinstance(device, int) or torch.device(device).type != "cpu"):
        raise ValueError(f"to_cpu=True contradicts device={device!r}")
    return torch.device("cpu")


def safetensors_weights_iterator(
    hf_weights_files: Sequence[Path] | Path,
    to_cpu: bool = False,
    broadcast: bool = True,
    async_broadcast: bool = False,
    *,
    device: devices.Device | None = None,
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
        device: where to put the tensors: the CPU or an accelerator; default: the accelerator of this process
            (``LOCAL_RANK``), or the CPU where there is none. On an accelerator a tensor starts at a multiple of 256
            bytes and shares a block of memory with its neighbours; the stream that is current when it is yielded may
            use it at once.
        group: the ranks that share the reading; default: all.
        strategy: ``"auto"``, ``"independent"``, ``"broadcast"`` or ``"striped"``.
        names: a collection of tensor names, or a predicate on names: only these are yielded and read.
        show_progress: a tqdm bar in bytes, on rank 0. Default: where stderr is a terminal, on loads longer than a
            second.
        backend: ``"mmap"``: copy-on-write views of the mapped file, as in safetensors. ``"pread"``: private
            memory, which later changes of the file cannot reach. On an accelerator memory is always private.

    Yields:
        ``(name, tensor)``. The tensor has the shape and dtype of the header (F4 as ``torch.float4_e2m1fn_x2``,
        whose last dimension counts pairs), is contiguous, and aligned to its dtype.

    Raises:
        FileNotFoundError: a file is missing (other errors of ``open()`` likewise).
        HeaderError: a file breaks a rule of the format; the subclass names the rule.
        ReadError: bytes could not be read; raised when the iteration reaches the first tensor they belong to.
        TensorError: torch lacks a tensor's dtype; raised when the iteration reaches it.
        OutOfMemoryError: memory for a tensor could not be had; on an accelerator it is also a
            ``torch.OutOfMemoryError``. Everything the load had is free again, except for tensors that were yielded.
        ValueError: a device that torch cannot use here.
        NotImplementedError: ranks that share the reading.
    """
    target = _target(to_cpu, device)
    if not to_cpu:
        require_independent(strategy, broadcast, group)
    if backend not in ("mmap", "pread"):
        raise ValueError(f"backend {backend!r}: must be 'mmap' or 'pread'")
    paths = [hf_weights_files] if isinstance(hf_weights_files, (str, os.PathLike)) else list(hf_weights_files)
    weights: WeightIterator | DeviceWeightIterator
    if target.type == "cpu":
        weights = WeightIterator(open_files(paths), names, backend=backend, read_ahead=True)
    else:
        weights = load_to_device(target, bytes_of_files(paths), len(paths), lambda: open_files(paths), names)
    if progress.wanted(show_progress):
        return progress.with_bar(weights, always=show_progress is True)
    return weights


__all__ = ["DeviceWeightIterator", "WeightIterator", "safetensors_weights_iterator"]
