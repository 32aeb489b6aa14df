"""Compare what weightload and safetensors make of the same bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import safetensors
from safetensors import SafetensorError

from weightload import _C, errors

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def ours(content: bytes) -> Tensors | errors.WeightLoadError:
    """Name, dtype, shape and bytes of every tensor, or the refusal."""
    try:
        file = _C.from_bytes(content)
    except errors.HeaderError as error:
        return error
    return {name: (dtype, shape, content[begin:end]) for name, dtype, shape, begin, end in file.tensors()}


def theirs(content: bytes) -> Tensors | SafetensorError:
    try:
        tensors = safetensors.deserialize(content)
    except SafetensorError as error:
        return error
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}


def disagreement(content: bytes) -> str | None:
    """A sentence where the two differ other than as they are meant to; None where they do not."""
    one, other = ours(content), theirs(content)
    if isinstance(one, Exception) and isinstance(other, Exception):
        return None
    if isinstance(one, Exception):
        return None if is_stricter(content, one) else f"only safetensors accepts it; here {one!r}"
    if isinstance(other, Exception):
        return None if has_borderline_number(content) else f"only weightload accepts it; there {other!r}"
    return None if one == other else f"{one} here, {other} there"


def is_stricter(content: bytes, error: errors.WeightLoadError) -> bool:
    """Whether weightload refuses this on purpose: names that occur twice, and two notations that no writer uses.

    safetensors' parser also takes an entry's fields as a list, ``["U8", [1], [0, 1]]``, and a dtype as a map,
    ``{"U8": null}``: accidents of how its types are derived, not of the format.
    """
    if isinstance(error, errors.DuplicateTensor):
        return True
    return isinstance(error, errors.InvalidTensorEntry) and any(
        isinstance(entry, list) or (isinstance(entry, dict) and isinstance(entry.get("dtype"), Pairs))
        for _, entry in entries(content)
    )


def has_borderline_number(content: bytes) -> bool:
    """Numbers in fields that nobody reads, so close to the largest double that parsers round them differently."""
    return any(1.797e308 <= abs(number) <= 1.798e308 for _, entry in entries(content) for number in numbers(entry))


def entries(content: bytes) -> list[tuple[str, Any]]:
    """Every name with its entry, also those that occur twice."""
    (length,) = struct.unpack("<Q", content[:8])
    top = json.loads(content[8 : 8 + length], object_pairs_hook=Pairs)
    return [(name, dict(entry) if isinstance(entry, Pairs) else entry) for name, entry in top]


class Pairs(tuple):  # type: ignore[type-arg]
    """The fields of a map, in order."""

    __slots__ = ()


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, dict):
        yield from numbers(list(value.values()))
