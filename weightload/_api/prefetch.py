"""safe_open's prefetch: tensors of one file that load in the background and are handed out once."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from weightload import _C, settings
from weightload._base.dtypes import PACK, TORCH_DTYPES
from weightload._base.handlers import pass_on
from weightload._base.plain_torch import plainly
from weightload._load.fetch import find
from weightload._load.start import Reading, Source, start
from weightload.errors import TensorError, located


class PrefetchLoader(_C.Prefetch):
    """Tensors that are loading, each of which is handed out once: by ``take``, or by iterating over ``(name, tensor)``.

    Tensors may be used at once on the stream that is current when they are handed out, and stay valid after
    ``close()``. Threads may share a loader. Also a context manager.

    It has no state in Python, where a signal handler may raise between any two lines.
    """

    if TYPE_CHECKING:

        def take(self, name: str) -> torch.Tensor:
            """Wait for a tensor and take it.

            Raises:
                TensorError: the tensor is not in the plan, or was taken before.
                WeightLoadError: the loader is closed.
                ReadError, OutOfMemoryError: as ``safetensors_weights_iterator``; from then on for every tensor that had
                    not come yet.
            """

        def __iter__(self) -> PrefetchLoader: ...

        def __next__(self) -> tuple[str, torch.Tensor]: ...

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_current_stream = plainly(torch.accelerator.current_stream)


def start_prefetch(
    reader: _C.TensorReader,
    plan: Mapping[str, slice | None] | None,
    device: torch.device,
    backend: str,
    threads: int | None = None,
    *,
    in_window: bool = False,
) -> PrefetchLoader:
    """Start loading what a plan picks of an open file; see ``safe_open.prefetch``.

    ``in_window``: not all of it at once, but the setting ``window_bytes`` ahead of the last in the file's order that
    was taken, to an accelerator ``device_block_bytes``. There, each tensor is in memory of its own, and may be dropped
    alone.
    """
    part = file = reader.file
    if plan is not None:
        if not isinstance(plan, Mapping):
            raise TypeError(f"a prefetch plan must map names to None or slices, got {type(plan).__name__}")
        if not plan:
            raise TensorError("prefetch plan selects no tensors")
        numbers = sorted(_entry(reader, name, wanted) for name, wanted in plan.items())
        part = reader.with_parts(numbers)
    names = part.names()
    for name, dtype, _, _, _ in part.tensors():
        if dtype not in TORCH_DTYPES:
            what = f"prefetch cannot hand out dtype {dtype}: torch has no matching dtype"
            raise located(TensorError(what), file.path, name)
    total = max(part.bytes_of(range(len(part))), 4096)
    source, window = Source.of([part], most_bytes=total), None if in_window else total
    with settings.override(threads=threads) if threads is not None else contextlib.nullcontext():
        weights = start(source, device, reading=Reading(backend, window_bytes=window, own_blocks=in_window))
    current = None if device.type == "cpu" else functools.partial(_current_stream, device)
    return PrefetchLoader(weights, names, current)


def _entry(reader: _C.TensorReader, name: str, wanted: slice | None) -> tuple[int, tuple[int, int] | None]:
    """A tensor's number and rows, from a plan."""
    number = find(reader, name)
    if wanted is None:
        return number, None
    if not isinstance(wanted, slice):
        raise TensorError(f"prefetch plan values must be None or a slice, got {type(wanted).__name__} for {name}")
    dtype, shape, begin, end = reader.info(number)
    if not shape:
        raise TensorError(f"cannot slice rows of the 0-d tensor {name}")
    if (dtype in PACK and len(shape) == 1) or (shape[0] and (end - begin) % shape[0]):
        raise TensorError(f"cannot slice rows of {name}: a row is not a whole number of bytes")
    for bound in (wanted.start, wanted.stop):
        try:
            whole = 0 if bound is None else operator.index(bound)
        except TypeError as failed:
            pass_on(failed)
            raise TensorError(f"prefetch plan slice bounds for {name} must be integers or None") from None
        if not -shape[0] <= whole <= shape[0]:  # Python would clamp it; a plan that goes past the tensor is a mistake
            raise TensorError(f"prefetch plan slice bound {whole} for {name} is out of range for {shape[0]} rows")
    try:
        first, last, step = wanted.indices(shape[0])
    except (TypeError, ValueError) as error:
        pass_on(error)
        raise TensorError(f"invalid prefetch plan slice for {name}: {error}") from error
    if step != 1:
        raise TensorError(f"prefetch plan slices must have step 1, got {step} for {name}")
    return number, (first, max(first, last))
