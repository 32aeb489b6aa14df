"""safe_open's prefetch: tensors of one file that load in the background and are handed out once."""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Iterator, Mapping

import torch

from weightload import _C, settings
from weightload.device_iterator import DeviceWeightIterator, load_to_device
from weightload.dtypes import TORCH_DTYPES
from weightload.errors import TensorError, WeightLoadError, located
from weightload.fetch import find
from weightload.iterator import WeightIterator
from weightload.plain_torch import plainly

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
        self._error: BaseException | None = None
        self._closed = False
        self._pulling = False  # by one thread at a time, which does not hold the lock meanwhile
        self._changed = threading.Condition()
        self._process = os.getpid()

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
        self._require_process()
        with self._changed:
            while True:
                if self._closed:
                    raise WeightLoadError(CLOSED)
                if name in self._waiting:
                    return self._hand_out(name)
                if name not in self._left:
                    known = name in self._names
                    raise TensorError(f"tensor {name} {'was taken before' if known else 'is not in the prefetch plan'}")
                self._pull()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            self._require_process()
            with self._changed:
                while not self._waiting and self._left and not self._closed:
                    self._pull()
                if self._closed or not self._left:
                    return
                name = next(iter(self._waiting))
                pair = name, self._hand_out(name)
            yield pair

    def _require_process(self) -> None:
        """In a forked child another thread may hold the lock for ever."""
        if os.getpid() != self._process:
            raise WeightLoadError("this prefetch was begun before fork(); its threads are in the parent process only")

    def _pull(self) -> None:
        """Wait until another tensor has come, or until another thread that waits for one has done so."""
        if self._error is not None:
            raise self._error.with_traceback(None)
        if self._pulling:
            self._changed.wait()
            return
        self._pulling = True
        self._changed.release()
        pulled: tuple[str, torch.Tensor] | None = None
        error: BaseException | None = None
        try:
            pulled = next(self._weights)
        except StopIteration:
            error = WeightLoadError(CLOSED)
        except BaseException as other:
            error = other
        self._changed.acquire()
        self._pulling = False
        self._changed.notify_all()
        if error is not None:
            if not self._closed:
                interrupted = WeightLoadError("the prefetch was interrupted")
                self._error = error if isinstance(error, Exception) else interrupted
            raise error
        if pulled is not None and pulled[0] in self._left:
            self._waiting[pulled[0]] = pulled[1], self._stream()

    def _stream(self) -> torch.Stream | None:
        return None if self._device.type == "cpu" else _current_stream(self._device)

    def _hand_out(self, name: str) -> torch.Tensor:
        tensor, ready_on = self._waiting.pop(name)
        del self._left[name]
        now = self._stream()
        if now is not None and ready_on is not None and now != ready_on:
            _use_on(now, tensor, ready_on)
        return tensor

    def close(self) -> None:
        """Stop loading and let go of what was not taken."""
        self._closed = True
        self._weights.close()  # wakes whoever waits for a tensor
        if os.getpid() != self._process:
            return
        with self._changed:
            self._changed.notify_all()
            self._waiting.clear()
            self._error = None

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_current_stream = plainly(torch.accelerator.current_stream)


@plainly
def _use_on(stream: torch.Stream, tensor: torch.Tensor, ready_on: torch.Stream) -> None:
    stream.wait_stream(ready_on)
    tensor.record_stream(stream)


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
            what = f"prefetch cannot hand out dtype {dtype}: torch has no matching dtype"
            raise located(TensorError(what), file.path, name)
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
    if (dtype == "F4" and len(shape) == 1) or (shape[0] and (end - begin) % shape[0]):
        raise TensorError(f"cannot slice rows of {name}: a row is not a whole number of bytes")
    for bound in (wanted.start, wanted.stop):
        try:
            whole = 0 if bound is None else operator.index(bound)
        except TypeError:
            raise TensorError(f"prefetch plan slice bounds for {name} must be integers or None") from None
        if not -shape[0] <= whole <= shape[0]:  # Python would clamp it; a plan that goes past the tensor is a mistake
            raise TensorError(f"prefetch plan slice bound {whole} for {name} is out of range for {shape[0]} rows")
    try:
        first, last, step = wanted.indices(shape[0])
    except (TypeError, ValueError) as error:
        raise TensorError(f"invalid prefetch plan slice for {name}: {error}") from error
    if step != 1:
        raise TensorError(f"prefetch plan slices must have step 1, got {step} for {name}")
    return number, (first, max(first, last))
