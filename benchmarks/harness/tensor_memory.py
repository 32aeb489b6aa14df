"""Where tensors' bytes are: touching every page of them, and whether they are a file's, shared, or their own."""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

Span = tuple[int, int]  # addresses, half open


def spans_of(tensors: Iterable[torch.Tensor]) -> list[Span]:
    """The pages of CPU tensors, joined where they follow each other."""
    page = mmap.PAGESIZE
    ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.nbytes)
    spans: list[Span] = []
    for begin, end in ends:
        begin, end = begin - begin % page, end + -end % page
        if spans and begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((begin, end))
    return spans


def touch(spans: Iterable[Span]) -> None:
    """Read one byte of each page; large spans with all of torch's threads, as whatever computes with them would."""
    for begin, end in spans:
        memory = (ctypes.c_ubyte * (end - begin)).from_address(begin)
        torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE].sum()


def overlapping(tensors: dict[str, torch.Tensor]) -> tuple[str, str] | None:
    """Two tensors that share bytes, which those of a safetensors file never do."""
    ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors.items() if t.nbytes)
    for (_, end, name), (begin, _, other) in pairwise(ends):
        if begin < end:
            return name, other
    return None


def mapped_bytes(tensors: Iterable[torch.Tensor], files: Sequence[str]) -> int:
    """Bytes of CPU tensors that are views of these files."""
    known = {os.path.realpath(file) for file in files}
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = [*line.split(maxsplit=5), ""][:6]
        begin, end = (int(part, 16) for part in addresses.split("-"))
        mappings.append((begin, end, path in known))
    begins = [begin for begin, _, _ in mappings]
    found = 0
    for tensor in tensors:
        at = bisect_right(begins, tensor.data_ptr()) - 1
        if tensor.nbytes and at >= 0 and tensor.data_ptr() < mappings[at][1] and mappings[at][2]:
            found += tensor.nbytes
    return found
