"""The fuzz target's first inputs, each named for the rule it breaks or the plan it leads to.

    python tests/fuzz/seeds.py          writes tests/fuzz/corpus anew

An input is 24 bytes of choices (input.h) and a file.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import DTYPE_BITS, entry, file_bytes
from support.headers import ACCEPTED, VIOLATIONS

from fuzz.build import SEEDS

CHOICES_BYTES = 24
DEVICE, MAP, SOME_ALONE, PAD = 1, 2, 4, 56
BROADCAST, STRIPED = 1, 2


def choices(
    flags: int = 0,
    ranks: int = 1,
    root: int = 0,
    strategy: int = 0,
    block: int = 4096,
    task: int = 4096,
    files: int = 1,
    alignment: int = 0,
    selection: int = 0,
    more_bytes: int = 0,
) -> bytes:
    return struct.pack(
        "<4B2H2BHIQ",
        *(flags, ranks - 1, root, strategy, block - 1, task - 1, files - 1, alignment, 0, selection, more_bytes),
    )


def file_of(tensors: list[tuple[str, list[int]]], holes: bool = False) -> tuple[bytes, int]:
    """A file of tensors of these dtypes and shapes, and the bytes of data that were left out of it."""
    header: dict[str, Any] = {}
    offset = 0
    for number, (dtype, shape) in enumerate(tensors):
        bits = DTYPE_BITS[dtype]
        for extent in shape:
            bits *= extent
        header[f"t{number}"] = entry(dtype, shape, offset, offset + bits // 8)
        offset += bits // 8
    text = json.dumps(header, separators=(",", ":")).encode()
    return file_bytes(text, b"" if holes else bytes(i % 251 for i in range(offset))), offset if holes else 0


def own_seeds() -> dict[str, bytes]:
    every = [(dtype, [8]) for dtype in DTYPE_BITS]
    odd = [("U8", [i * 37 % 301]) for i in range(20)]
    mixed = [("U8", [3]), ("F64", [5]), ("U8", [0]), ("BF16", [7, 3]), ("F32", []), ("F4", [2, 3]), ("F64", [0, 9])]
    large = [("BF16", [1 << 20, 1 << 12]), ("U8", [1]), ("F32", [3, 1 << 38]), ("U8", [0])]

    def seed(tensors: list[tuple[str, list[int]]], holes: bool = False, **options: int) -> bytes:
        content, left_out = file_of(tensors, holes)
        return choices(more_bytes=left_out, **options) + content

    return {
        "plan-every-dtype-mapped": seed(every, flags=MAP),
        "plan-every-dtype-device": seed(every, flags=DEVICE),
        "plan-mixed-sizes-in-small-blocks": seed(mixed, block=16, task=7),
        "plan-mixed-sizes-mapped-three-files": seed(mixed, flags=MAP, files=3, block=64),
        # The first of two tensors in one file, the second in the other: neighbours by offset only.
        "plan-half-of-one-file-half-of-another": seed([("U8", [40]), ("U8", [50])], files=2, selection=22),
        "plan-half-of-one-file-half-of-another-device": seed(
            [("U8", [40]), ("U8", [50])], flags=DEVICE, files=2, selection=22
        ),
        "plan-mixed-sizes-some-alone": seed(mixed, flags=MAP | SOME_ALONE, selection=5),
        "plan-odd-sizes-device-some-alone": seed(odd, flags=DEVICE | SOME_ALONE, files=2, selection=9, block=2000),
        "plan-odd-sizes-broadcast-to-three": seed(odd, ranks=3, root=1, strategy=BROADCAST, block=700, task=100),
        "plan-odd-sizes-striped-by-five": seed(odd, ranks=5, strategy=STRIPED, block=1500, task=100),
        "plan-odd-sizes-device-striped-by-64": seed(odd, flags=DEVICE, ranks=64, strategy=STRIPED, block=65536),
        "plan-huge-sparse-file-mapped": seed(large, holes=True, flags=MAP),
        "plan-huge-sparse-file-device-striped": seed(large, holes=True, flags=DEVICE, ranks=7, strategy=STRIPED),
        "plan-largest-file": seed([("U8", [2**61 + 2**60])], holes=True, flags=DEVICE),
        "refused-in-sparse-file-HeaderTooLarge": choices(more_bytes=2**40) + file_bytes(b"{}", length=100_000_001),
        "plan-header-of-70-kilobytes": seed(odd, flags=PAD),
    }


def all_seeds() -> dict[str, bytes]:
    found = own_seeds()
    for number, (rule, content) in enumerate(VIOLATIONS):
        found[f"refused-{number:02}-{rule}"] = choices(flags=PAD if number % 2 else 0) + content
    for number, content in enumerate(ACCEPTED):
        found[f"accepted-{number:02}"] = choices(flags=MAP if number % 2 else DEVICE) + content
    return found


if __name__ == "__main__":
    SEEDS.mkdir(exist_ok=True)
    for old in SEEDS.iterdir():
        old.unlink()
    for name, content in all_seeds().items():
        (SEEDS / name).write_bytes(content)
