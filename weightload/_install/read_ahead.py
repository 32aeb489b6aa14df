"""A handle whose slices stay lazy, and whose bytes come ahead of them once the first is asked for."""

from __future__ import annotations

import threading
from typing import Any

import torch

from weightload import _C
from weightload._api.prefetch import PrefetchLoader, start_prefetch
from weightload._api.safe_open import TensorSlice, safe_open
from weightload._base.handlers import pass_on
from weightload._load.fetch import fetch, find, meminfo
from weightload.errors import TensorError, WeightLoadError


class SafeOpen(safe_open):
    """``safe_open``, for frameworks that ask for slices of many tensors and index them later.

    Nothing is read until a slice is indexed. When the first one is wanted whole, those that were asked for by then
    begin to come in the order in which they lie in the file, at most the setting ``window_bytes`` ahead of what was
    wanted last, if they are not in the page cache. Parts of tensors are read by themselves: whoever wants parts leaves
    the rest to others.
    """

    def __init__(self, filename: Any, **options: Any) -> None:
        super().__init__(filename, **options)
        self._ahead = ReadAhead(self._opened(), self._device, self._backend)

    def __exit__(self, *exception: object) -> None:
        self._ahead.close()
        super().__exit__(*exception)

    def get_slice(self, name: str) -> Slice:
        """A tensor to be indexed, as ``safe_open.get_slice``."""
        reader = self._opened()
        number = find(reader, name)
        self._ahead.expect(name)
        return Slice(reader, number, self._device, self._backend, name, self._ahead)


class Slice(TensorSlice):
    """A tensor of a file that is read when it is indexed, or before."""

    def __init__(
        self,
        reader: _C.TensorReader,
        number: int,
        device: torch.device,
        backend: str,
        name: str,
        ahead: ReadAhead,
    ) -> None:
        super().__init__(reader, number, device, backend)
        self._name, self._ahead = name, ahead

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is Ellipsis or (isinstance(index, slice) and index == slice(None) and self._shape):
            whole = self._ahead.take(self._name)
            if whole is not None:
                return whole
        return super().__getitem__(index)

    def to(self, device: torch.device) -> torch.Tensor:
        """All of it on a device, by way of page-locked memory if that is an accelerator.

        Raises:
            ReadError, TensorError, OutOfMemoryError: as ``safe_open.get_tensor``.
        """
        return fetch(self._reader, self._number, device, "pread")


class ReadAhead:
    """Loads tensors of one file in the background, once the first of them is wanted. Many threads."""

    def __init__(self, reader: _C.TensorReader, device: torch.device, backend: str) -> None:
        self._reader, self._device, self._backend = reader, device, backend
        self._lock = threading.Lock()  # guards what follows
        self._expected: dict[str, None] = {}
        self._loader: PrefetchLoader | None = None
        self._has_begun = device.type != "cpu"  # what goes to an accelerator is loaded one by one

    def expect(self, name: str) -> None:
        """A tensor will be wanted, perhaps."""
        if not self._has_begun:
            self._expected[name] = None

    def take(self, name: str) -> torch.Tensor | None:
        """A tensor, when it has come; None if it does not come, or was taken before."""
        with self._lock:
            if not self._has_begun:
                self._has_begun = True
                self._loader = self._begin()
            loader = self._loader
            if loader is None or name not in self._expected:
                return None
            del self._expected[name]
        try:
            tensor: torch.Tensor = loader.take(name)
            return tensor
        except WeightLoadError as error:
            # Others ask for themselves from now on. The loader has the error, which has this frame.
            with self._lock:
                self._loader = None
            pass_on(error)
            if type(error) is WeightLoadError:  # closed meanwhile
                return None
            raise
        finally:
            del loader

    def close(self) -> None:
        """Stop. What was taken stays usable."""
        with self._lock:
            self._has_begun = True
            loader, self._loader = self._loader, None
            self._expected.clear()
        if loader is not None:
            loader.close()

    def _begin(self) -> PrefetchLoader | None:
        file = self._reader.file
        if len(self._expected) < 2 or file.size < _C.TensorReader.LEAST_FOR_THREADS:
            return None
        if self._backend == "mmap":
            if self._reader.is_at_hand(0, file.size):
                return None
        elif file.size > meminfo().get("MemAvailable", file.size):
            return None  # each tensor is memory of its own
        try:
            plan = dict.fromkeys(self._expected)
            return start_prefetch(self._reader, plan, self._device, self._backend, in_window=True)
        except TensorError as error:  # of a dtype that torch lacks: who wants that one hears of it
            pass_on(error)
            return None
