"""safe_open's prefetch: tensors of one file that load in the background and are handed out once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import torch

from weightload import _C, settings
from weightload.device_iterator import DeviceWeightIterator, load_to_device
from weightload.dtypes import TORCH_DTYPES
from weightload.errors import TensorError, WeightLoadError
from weightload.fetch import find
from weightload.iterator import WeightIterator
from weightload.rows import Run

CLOSED = "the prefetch loader is closed"


class PrefetchLoader:
    """Tensors that are loading, each of which is handed out once: by ``take``, or by iterating over ``(name, tensor)``.

    Tensors may be used at once on the stream that is current when they are handed out, and stay valid after
    ``close()``. Threads may share a loader. Also a context manager.
    """

    def __init__(self, weights: WeightIterator | DeviceWeightIterator, names: list[str], device: torch.device) -> None:
        self._weights, self._names, self._device = weights, names, device
        self._left = dict.fromkeys(names)
        self._waiting: dict[str, tuple[torch.Tensor, torch.Stream | None]] = {}
        self._error: Exception | None = None
        self._closed = False
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """All names, taken or not, in the order in which they load."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def take(self, name: str) -> torch.Tensor:
        """Wait for a tensor and take it.

        Raises:
            TensorError: the tensor is not in the plan, or was taken before.
            WeightLoadError: the loader is closed.
            ReadError, OutOfMemoryError: as ``safetensors_weights_iterator``; from then on for every tensor that had
                not come yet.
        """
        with self._lock:
            if self._closed:
                raise WeightLoadError(CLOSED)
            if name not in self._left:
                known = name in self._names
                raise TensorError(f"tensor {name} {'was taken before' if known else 'is not in the prefetch plan'}")
            while name not in self._waiting:
                self._pull()
            return self._hand_out(name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            with self._lock:
                if self._closed or not self._left:
                    return
                if not self._waiting:
                    self._pull()
                name = next(iter(self._waiting))
                pair = name, self._hand_out(name)
            yield pair

    def _pull(self) -> None:
        """Wait for the next tensor."""
        if self._error is not None:
            raise self._error
        try:
            name, tensor = next(self._weights)
        except StopIteration:  # closed by another thread
            raise WeightLoadError(CLOSED) from None
        except Exception as error:
            self._error = error
            raise
        self._waiting[name] = tensor, self._stream()

    def _stream(self) -> torch.Stream | None:
        return None if self._device.type == "cpu" else torch.accelerator.current_stream(self._device)

    def _hand_out(self, name: str) -> torch.Tensor:
        tensor, ready_on = self._waiting.pop(name)
        del self._left[name]
        now = self._stream()
        if now is not None and ready_on is not None and now != ready_on:
            now.wait_stream(ready_on)
            tensor.record_stream(now)
        return tensor

    def close(self) -> None:
        """Stop loading and let go of what was not taken."""
        self._closed = True
        self._weights.close()  # wakes whoever waits in take()
        with self._lock:
            self._waiting.clear()
            self._error = None

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def start_prefetch(
    reader: _C.TensorReader,
    plan: Mapping[str, slice | None] | None,
    device: torch.device,
    backend: str,
    threads: int | None = None,
) -> PrefetchLoader:
    """Start loading what a plan picks of an open file; see ``safe_open.prefetch``."""
    part = file = reader.file
    if plan is not None:
        if not plan:
            raise TensorError("prefetch plan selects no tensors")
        numbers = sorted(_entry(reader, name, wanted) for name, wanted in plan.items())
        part = reader.with_parts(numbers)
    names = part.names()
    for name, dtype, _, _, _ in part.tensors():
        if dtype not in TORCH_DTYPES:
            error = TensorError(f"prefetch cannot hand out dtype {dtype}: torch has no matching dtype")
            error.filename, error.tensor = file.path, name
            raise error
    everything = list(range(len(part)))
    total = max(part.bytes_of(everything), 4096)
    weights: WeightIterator | DeviceWeightIterator
    with settings.override(threads=threads) if threads is not None else contextlib.nullcontext():
        if device.type == "cpu":
            with settings.override(window_bytes=total):
                weights = WeightIterator([part], [everything], backend=backend, read_ahead=True)
        else:
            weights = load_to_device(device, total, [file.path], lambda: [part], None, window_bytes=total)
    return PrefetchLoader(weights, names, device)


def _entry(reader: _C.TensorReader, name: str, wanted: slice | None) -> tuple[int, Run | None]:
    """A tensor's number and rows, from a plan."""
    number = find(reader, name)
    if wanted is None:
        return number, None
    if not isinstance(wanted, slice):
        raise TensorError(f"prefetch plan values must be None or a slice, got {type(wanted).__name__} for {name}")
    shape = reader.info(number)[1]
    if not shape:
        raise TensorError(f"cannot slice rows of the 0-d tensor {name}")
    for bound in (wanted.start, wanted.stop):
        # Python would clamp it; a plan that goes past the tensor is a mistake.
        if bound is not None and not (isinstance(bound, int) and -shape[0] <= bound <= shape[0]):
            raise TensorError(f"prefetch plan slice bound {bound!r} for {name} is out of range for {shape[0]} rows")
    try:
        begin, end, step = wanted.indices(shape[0])
    except (TypeError, ValueError) as error:
        raise TensorError(f"invalid prefetch plan slice for {name}: {error}") from error
    if step != 1:
        raise TensorError(f"prefetch plan slices must have step 1, got {step} for {name}")
    return number, (begin, max(begin, end))
