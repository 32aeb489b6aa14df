"""Tensors of which an engine's loader reads what it narrows them to, as it is loaded for one of several ranks.

What a loader wants of the tensors of one layer, it wants of those of the next: so that is read ahead. What it wants of
the first, and what it has not wanted before, is read when it asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch

from weightload import _C, settings
from weightload._api.safe_open import TensorSlice
from weightload._base.dtypes import PACK, TORCH_DTYPES
from weightload._checkpoint.selection import Names, open_files, select_all
from weightload._load.start import Reading, Source, Started, Wanted, start
from weightload._parts.boxes import Bounds
from weightload._parts.lazy import LazyTensor, Unread
from weightload._parts.shards import Part, Ranges

LEAST_BYTES = 64 << 10
"""The fewest bytes of a tensor that is handed out unread. Smaller ones (norms, scales) are read whole, ahead."""

Kind = tuple[str, str, tuple[int, ...]]
"""The common part of tensors of one kind, one in each layer: name but for its first number, dtype and shape."""


@dataclasses.dataclass
class Counts:
    """Bytes of a load."""

    checkpoint: int = 0
    """Bytes of the tensors that were handed out."""
    ahead: int = 0
    """Read before the loader asked."""
    asked: int = 0
    """Read when it did."""
    starts: int = 0
    """How often reading ahead began anew, as more was known."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """A tensor of the load."""

    file: int
    number: int
    """In its file."""
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @functools.cached_property
    def kind(self) -> Kind | None:
        """None: it is read whole."""
        # torch counts otherwise in the last dimension of what is packed.
        if self.bytes < LEAST_BYTES or self.dtype not in TORCH_DTYPES or self.dtype in PACK:
            return None
        return re.sub(r"\d+", "#", self.name, count=1), self.dtype, self.shape


def _around(boxes: Iterable[Bounds]) -> Part:
    """The part that all boxes lie in."""
    return tuple(_merged(ranges) for ranges in zip(*boxes, strict=True))


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return tuple(found)


class InParts:
    """Iterates, once, over the tensors of files: files in the given order, the tensors of each by name.

    Of a name in several files the last one counts, as with ``duplicates="last"``. Large tensors are handed out unread.
    They may outlive the iteration.

    Args:
        files: paths.
        device: the CPU, or an accelerator.
        backend: of ``safetensors_weights_iterator``.
        names: of these tensors only.
        values: settings for all that is read.
    """

    def __init__(
        self,
        files: Sequence[str],
        device: torch.device,
        backend: Literal["mmap", "pread"] = "mmap",
        names: Names | None = None,
        values: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.counts = Counts()
        self._paths, self._device, self._backend, self._values = list(files), device, backend, values
        self._files = open_files(files)
        self._readers: dict[int, _C.TensorReader] = {}
        self._places = list(self._in_order(select_all(self._files, names, "last")))
        self._asked: dict[Kind | None, list[Bounds]] = {}
        self._known: dict[Kind | None, Part] = {}
        self._plan: dict[str, Part | None] = {}
        self._weights: Started | None = None
        self._held: dict[str, torch.Tensor] = {}

    def _in_order(self, selection: list[list[int]]) -> Iterator[_Place]:
        for at, (file, numbers) in enumerate(zip(self._files, selection, strict=True)):
            tensors = file.tensors()
            of_file = [_Place(at, number, *tensors[number]) for number in numbers]
            yield from sorted(of_file, key=lambda place: place.name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            self._start(0)
            for at, place in enumerate(self._places):
                if place.kind not in self._known and self._asked.get(place.kind):
                    self._start(at)
                self.counts.checkpoint += place.bytes
                yield place.name, self._tensor(place)
        finally:
            self._stop()
            self._files.clear()
            self._readers.clear()

    def _tensor(self, place: _Place) -> torch.Tensor:
        ahead = None
        if place.name in self._plan:
            memory, part = self._take(place.name), self._plan[place.name]
            if part is None:
                return memory
            ahead = part, memory
        assert place.kind is not None
        reader = self._readers.get(place.file) or _C.TensorReader(self._files[place.file])
        self._readers[place.file] = reader
        # It may outlive this iteration, which does not keep files open.
        read = functools.partial(
            self._read, reader, place.number, self._device, self._backend, self._values, self.counts
        )
        asked = self._asked.setdefault(place.kind, [])
        unread = Unread(place.shape, TORCH_DTYPES[place.dtype], self._device, read, ahead, asked)
        return LazyTensor(unread)

    def _take(self, name: str) -> torch.Tensor:
        """The part of a tensor that was read ahead."""
        while name not in self._held:
            assert self._weights is not None
            found, tensor = next(self._weights)
            self._held[found] = tensor
        tensor = self._held.pop(name)
        self.counts.ahead += tensor.nbytes
        return tensor

    @staticmethod
    def _read(
        reader: _C.TensorReader,
        number: int,
        device: torch.device,
        backend: str,
        values: Mapping[str, Any],
        counts: Counts,
        box: tuple[slice, ...],
    ) -> torch.Tensor:
        """Read a part that was asked for and is not there."""
        with settings.override(**values):
            found = TensorSlice(reader, number, device, backend)[box]
        counts.asked += found.nbytes
        return found

    def _start(self, at: int) -> None:
        """Read ahead, from this place on, what is known to be wanted by now."""
        self._stop()
        self._known = {kind: _around(boxes) for kind, boxes in self._asked.items() if boxes}
        wanted = [place for place in self._places[at:] if place.kind is None or place.kind in self._known]
        plan = {place.name: self._part(place) for place in wanted}
        self._plan = plan
        if not plan:
            return
        self.counts.starts += 1
        first, most = wanted[0].file, sum(place.bytes for place in wanted)
        source = Source.of(self._files[first:], self._paths[first:], most)

        def shard(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Part | None:
            return plan[name]

        with settings.override(**self._values):
            boxes = Wanted(plan, shard=shard, duplicates="last")
            self._weights = start(source, self._device, boxes, reading=Reading(self._backend))

    def _part(self, place: _Place) -> Part | None:
        """The part of a tensor to read ahead; None: all of it."""
        if place.kind is None:
            return None
        wanted = self._known[place.kind]
        whole: Part = tuple(((0, size),) for size in place.shape)
        if self._device.type == "cpu" and self._backend == "mmap":
            # Columns of a mapped tensor are a view, whose pages have most of its rows. To read them costs a copy.
            rows = ((wanted[0][0][0], wanted[0][-1][1]),)
            wanted = rows, *whole[1:]
        return None if wanted == whole else wanted

    def _stop(self) -> None:
        """Read nothing ahead any more, and forget what has been."""
        self._held.clear()
        if self._weights is not None:
            self._weights.close()
            self._weights = None


__all__ = ["Counts", "InParts"]
