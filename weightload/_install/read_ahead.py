"""A handle whose slices stay lazy, and whose bytes come ahead of them once it is known which are wanted."""

from __future__ import annotations

import threading
from typing import Any

import torch

from weightload import _C
from weightload._api.prefetch import PrefetchLoader, start_prefetch
from weightload._api.safe_open import TensorSlice, safe_open
from weightload._base.handlers import pass_on
from weightload._load.fetch import fetch, find
from weightload.errors import TensorError, WeightLoadError


class SafeOpen(safe_open):
    """``safe_open``, for frameworks that ask for slices of all tensors, and index those that the model has."""

    def __init__(self, filename: Any, **options: Any) -> None:
        super().__init__(filename, **options)
        self._ahead = ReadAhead(self._opened()) if self._on_cpu and self._maps else None

    def __exit__(self, *exception: object) -> None:
        if self._ahead is not None:
            self._ahead.close()
        super().__exit__(*exception)

    def get_slice(self, name: str) -> Slice:
        """A tensor to be indexed, as ``safe_open.get_slice``."""
        reader = self._opened()
        return Slice(reader, find(reader, name), self._device, self._backend, name, self._ahead)


class Slice(TensorSlice):
    """A tensor of a file that is read when it is indexed, or before: see ``will_be_wanted``."""

    def __init__(
        self,
        reader: _C.TensorReader,
        number: int,
        device: torch.device,
        backend: str,
        name: str,
        ahead: ReadAhead | None,
    ) -> None:
        super().__init__(reader, number, device, backend)
        self._name, self._ahead = name, ahead

    def will_be_wanted(self) -> None:
        """Say that all of it will be indexed soon: its bytes may come before that. Nothing is read by this."""
        if self._ahead is not None:
            self._ahead.expect(self._name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._ahead is not None and index is Ellipsis:
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
    """Loads tensors of one file in the background, of those of which it is known that they will be wanted.

    Whoever takes the first begins with all that are known by then, in the order in which they lie in the file, at most
    the setting ``window_bytes`` ahead of what is taken. What becomes known later is begun when one of it is taken. Many
    threads; a signal's handler may call it, too.
    """

    def __init__(self, reader: _C.TensorReader) -> None:
        self._reader = reader
        self._lock = threading.RLock()  # guards what follows
        self._expected: dict[str, None] = {}
        self._coming: dict[str, PrefetchLoader] = {}
        self._is_of_use: bool | None = None  # not known yet

    def expect(self, name: str) -> None:
        """A tensor will be wanted."""
        if self._is_of_use is not False:
            self._expected[name] = None

    def take(self, name: str) -> torch.Tensor | None:
        """A tensor, when it has come; None if it does not come, or was taken before."""
        if name not in self._coming and name not in self._expected:
            return None
        with self._lock:
            if name in self._expected:
                self._begin()
            loader = self._coming.pop(name, None)
        if loader is None:
            return None
        try:
            tensor: torch.Tensor = loader.take(name)
            return tensor
        except WeightLoadError as error:
            self._forget(loader)  # it has the error, which has this frame
            pass_on(error)
            if type(error) is WeightLoadError:  # closed meanwhile
                return None
            raise
        finally:
            del loader

    def close(self) -> None:
        """Stop. What was taken stays usable."""
        self._is_of_use = False
        with self._lock:
            loaders = list({id(loader): loader for loader in self._coming.values()}.values())
            self._expected.clear()
            self._coming.clear()
        for loader in loaders:
            loader.close()

    def _forget(self, failed: PrefetchLoader) -> None:
        with self._lock:
            for name in [name for name, loader in self._coming.items() if loader is failed]:
                del self._coming[name]

    def _begin(self) -> None:
        """With the lock held. A signal's handler that comes in here, and takes one, reads for itself."""
        plan, self._expected = self._expected, {}
        if self._is_of_use is None:
            size = self._reader.file.size
            self._is_of_use = size >= _C.TensorReader.LEAST_FOR_THREADS and not self._reader.is_at_hand(0, size)
        if not self._is_of_use or len(plan) < 2:
            return
        try:
            loader = start_prefetch(self._reader, plan, torch.device("cpu"), "mmap", in_window=True)
        except TensorError as error:  # of a dtype that torch lacks: who wants that one hears of it
            pass_on(error)
            return
        self._coming.update(dict.fromkeys(plan, loader))
