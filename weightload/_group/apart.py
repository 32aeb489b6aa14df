"""Loads in which ranks want different tensors, or parts of them: what all want is shared, the rest each reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from weightload import _C
from weightload._base.load_stats import LoadStats, joined
from weightload._base.uncopied import Load, StandsForALoad
from weightload._group.ranks import RECORD_BYTES
from weightload._parts.shards import Parts, bytes_of_part

LEAST_SHARED = 0.1
"""A part of what the rank that wants most reads. Where less is common to all, each reads everything for itself."""


class OneLoad(Load, Protocol):
    """One of the core's."""

    def tell_ranks_of(self, other: Any) -> None:
        """Have the ranks that share another load hear of an error of this one."""


class SharedAndOwn(StandsForALoad):
    """Two loads of one selection, as one: ``(name, tensor)`` in its order; otherwise as either of them.

    Args:
        shared: the load of what all ranks want.
        own: the load of the rest, by this rank.
        is_shared: of each tensor, in order, which load it is of.
    """

    def __init__(self, shared: OneLoad, own: OneLoad, is_shared: Sequence[bool]) -> None:
        super().__init__(shared)
        own.tell_ranks_of(shared)
        self._loads = own, shared
        self._is_shared = is_shared
        self._at = 0
        self._lock = threading.RLock()  # threads may share an iterator
        self.total_bytes += own.total_bytes

    def __next__(self) -> tuple[str, torch.Tensor]:
        with self._lock:
            try:
                if self._at == len(self._is_shared):
                    raise StopIteration
                item = next(self._loads[self._is_shared[self._at]])
            except BaseException:  # as with a generator, the end
                self.close()
                raise
            self._at += 1
            return item

    def __len__(self) -> int:
        return len(self._is_shared)

    def close(self) -> None:
        """Stop both, also while another thread waits for one of them."""
        for load in self._loads:
            load.close()

    def stats(self) -> LoadStats:
        """Statistics of both so far."""
        return joined(*(load.stats() for load in self._loads))


def split(selection: Sequence[Sequence[int]], common: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[bool]]:
    """Return the selected tensors that are not ``common`` to all ranks; and for each in order, whether it is."""
    rest: list[list[int]] = []
    is_common: list[bool] = []
    for numbers, shared in zip(selection, map(set, common), strict=True):
        rest.append([number for number in numbers if number not in shared])
        is_common += [number in shared for number in numbers]
    return rest, is_common


class Wishes:
    """The tensors that each rank of a load wants of its files, which are the same on all.

    A wish is a record of the same size on all ranks: how many bytes, then two bits for each tensor of the files.
    Whether the rank wants any of it, and whether all of it. It takes ``record_bytes`` with a first byte before it.
    """

    def __init__(self, files: Sequence[_C.CheckpointFile]) -> None:
        self._files = files
        self._count = sum(map(len, files))
        self.record_bytes = max(RECORD_BYTES, 1 + 8 + 2 * ((self._count + 7) // 8))

    def of_rank(self, selection: Sequence[Sequence[int]], parts: Parts) -> bytes:
        """This rank's wish."""
        begin = total = 0
        some, whole = (bytearray((self._count + 7) // 8) for _ in range(2))
        for file, numbers in zip(self._files, selection, strict=True):
            tensors = file.tensors()
            for number in numbers:
                name, dtype, shape, first, last = tensors[number]
                part = parts.get(name)
                total += last - first if part is None else bytes_of_part(last - first, part, dtype, shape)
                byte, bit = (begin + number) // 8, 1 << (begin + number) % 8
                some[byte] |= bit
                if part is None:
                    whole[byte] |= bit
            begin += len(tensors)
        return total.to_bytes(8, "little") + bytes(some) + bytes(whole)

    def common(self, wishes: Sequence[bytes]) -> list[list[int]] | None:
        """The tensors that all ranks want in full, by file; none if they are not worth sharing. The same on all ranks.

        None: they want tensors of one name from different files.
        """
        size = (self._count + 7) // 8
        wanted = 0
        whole = (1 << self._count) - 1
        for wish in wishes:
            wanted |= int.from_bytes(wish[8 : 8 + size], "little")
            whole &= int.from_bytes(wish[8 + size : 8 + 2 * size], "little")
        names = [name for one in map(_of, self._files, self._by_file(wanted)) for name in one]
        if len(set(names)) < len(names):
            return None
        common = self._by_file(whole)
        most = max(int.from_bytes(wish[:8], "little") for wish in wishes)
        shared = sum(map(_C.CheckpointFile.bytes_of, self._files, common))
        return common if shared and shared >= LEAST_SHARED * most else [[] for _ in self._files]

    def _by_file(self, bits: int) -> list[list[int]]:
        """The tensors of each file whose bits are set."""
        text = f"{bits:0{self._count}b}"[::-1]
        found = []
        begin = 0
        for file in self._files:
            here = text[begin : begin + len(file)]
            found.append([number for number, bit in enumerate(here) if bit == "1"])
            begin += len(file)
        return found


def _of(file: _C.CheckpointFile, numbers: Sequence[int]) -> list[str]:
    names = file.names()
    return [names[number] for number in numbers]
