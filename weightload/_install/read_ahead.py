"""A handle whose slices stay lazy, and whose bytes come ahead of them once it is known which are wanted."""

from __future__ import annotations

import threading
from typing import Any

import torch

from weightload import _C
from weightload._api.prefetch import PrefetchLoader, start_prefetch
from weightload._api.safe_open import TensorSlice, safe_open
from weightload._base.handlers import pass_on
from weightload._load.devices import CPU
from weightload._load.fetch import LEAST_FOR_PIPELINE, fetch, find
from weightload.errors import OutOfMemoryError, TensorError, WeightLoadError

PILE = 256 << 20  # bytes of a device's memory; to load this many takes several times as long as to begin a load


class SafeOpen(safe_open):
    """``safe_open``, for frameworks that ask for slices of all tensors, and index those that the model has."""

    def __init__(self, filename: Any, **options: Any) -> None:
        super().__init__(filename, **options)
        self._ahead = Ahead(self._opened(), self._on_cpu and self._maps)

    def __exit__(self, *exception: object) -> None:
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
        ahead: Ahead,
    ) -> None:
        super().__init__(reader, number, device, backend)
        self._name, self._ahead = name, ahead

    def will_be_wanted(self, device: torch.device = CPU) -> None:
        """Say that all of it will be wanted there soon: its bytes may come before that. Nothing is read by this."""
        if (ahead := self._ahead.to(device)) is not None:
            ahead.expect(self._name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is Ellipsis and (ahead := self._ahead.to(CPU)) is not None:
            whole = ahead.take(self._name)
            if whole is not None:
                return whole
        return super().__getitem__(index)

    def to(self, device: torch.device) -> torch.Tensor:
        """All of it on a device, by way of page-locked memory if that is an accelerator.

        Raises:
            ReadError, TensorError, OutOfMemoryError: as ``safe_open.get_tensor``.
        """
        ahead = self._ahead.to(device)
        whole = ahead.take(self._name) if ahead is not None else None
        return fetch(self._reader, self._number, device, "pread") if whole is None else whole


class Ahead:
    """Reads ahead of the slices of one file: a ``ReadAhead`` for each device that they go to."""

    def __init__(self, reader: _C.TensorReader, to_cpu: bool) -> None:
        self._reader, self._to_cpu = reader, to_cpu
        self._of: dict[torch.device, ReadAhead] = {}

    def to(self, device: torch.device) -> ReadAhead | None:
        """None for a CPU whose slices are to be in memory of their own."""
        if device.type == "cpu" and not self._to_cpu:
            return None
        return self._of.get(device) or self._of.setdefault(device, ReadAhead(self._reader, device))

    def close(self) -> None:
        for ahead in list(self._of.values()):
            ahead.close()


class ReadAhead:
    """Loads tensors of one file to a device in the background, of those of which it is known that they will be wanted.

    Whoever takes the first begins with all that are known by then, in the order in which they lie in the file, at most
    a window ahead of what is taken (see ``start_prefetch``). What becomes known later is begun when one of it is taken.
    To an accelerator, whose memory is short, it begins with the next ``PILE`` bytes of them: frameworks take them in
    another order than that of the file, and what comes before its turn takes memory. Where that runs out, each
    tensor is read when it is asked for. Many threads; a signal's handler may call it, too.
    """

    def __init__(self, reader: _C.TensorReader, device: torch.device) -> None:
        self._reader, self._device = reader, device
        self._lock = threading.RLock()  # guards what follows
        self._expected: dict[str, None] = {}
        self._coming: dict[str, PrefetchLoader] = {}
        # Also for what is in the page cache: threads map it in a fraction of what its page faults take.
        least = LEAST_FOR_PIPELINE if device.type != "cpu" else _C.TensorReader.LEAST_FOR_THREADS
        self._is_of_use = reader.file.size >= least  # until it is closed

    def expect(self, name: str) -> None:
        """A tensor will be wanted."""
        if self._is_of_use:
            with self._lock:
                self._expected[name] = None

    def take(self, name: str) -> torch.Tensor | None:
        """A tensor, when it has come; None if it does not come, or was taken before."""
        if not self._is_of_use:
            return None
        with self._lock:  # not before: another thread may be about to begin with it
            if name in self._expected:
                self._begin(name)
            loader = self._coming.pop(name, None)
        if loader is None:
            return None
        try:
            tensor: torch.Tensor = loader.take(name)
            return tensor
        except WeightLoadError as error:
            self._forget(loader)  # it has the error, which has this frame
            pass_on(error)
            if isinstance(error, OutOfMemoryError) and self._device.type != "cpu":
                loader.close()  # gives back what has come and is not taken
                return None
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

    def _begin(self, first: str) -> None:
        """With the lock held. A signal's handler that comes in here, and takes one, reads for itself."""
        plan = self._next_of_expected(first)
        if not self._is_of_use or len(plan) < 2:
            return
        try:
            loader = start_prefetch(self._reader, plan, self._device, "mmap", in_window=True)
        except TensorError as error:  # of a dtype that torch lacks: a caller that wants that one hears of it
            pass_on(error)
            return
        self._coming.update(dict.fromkeys(plan, loader))

    def _next_of_expected(self, first: str) -> dict[str, None]:
        """With the lock held."""
        if self._device.type == "cpu":
            plan, self._expected = self._expected, {}
            return plan
        plan, total = {}, 0
        for name in dict.fromkeys([first, *self._expected]):
            *_, begin, end = self._reader.info(find(self._reader, name))
            if plan and total + end - begin > PILE:
                break
            plan[name] = self._expected.pop(name)
            total += end - begin
        return plan
