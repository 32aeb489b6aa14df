"""Safetensors files made up by hypothesis: valid ones of every kind, and damaged ones."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from typing import Any

from conftest import DTYPE_BITS, TORCH_DTYPES, entry, file_bytes
from hypothesis import strategies as st

# Any text but lone surrogates, which JSON in UTF-8 cannot hold; some that collide with what headers are made of.
NAMES = st.one_of(
    st.sampled_from(
        ["", "dtype", "shape", "data_offsets", "__metadata", "a.b/c", "\0", '"\\', "\u2028", "ü", "😀", "\x7f"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
).filter(lambda name: name != "__metadata__")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
WHITESPACE = st.sampled_from(["", " ", "\n", "\t ", "\r\n"])


@dataclasses.dataclass
class File:
    """A valid file, and what it is made of."""

    json: bytes
    data: bytes
    names: list[str]  # by offset, where no two are empty at the same place

    @property
    def content(self) -> bytes:
        return file_bytes(self.json, self.data)


@st.composite
def shapes(draw: st.DrawFn, dtype: str, most: int) -> list[int]:
    shape = draw(st.lists(st.integers(0, most), max_size=4 if most < 100 else 1))
    bits = DTYPE_BITS[dtype]
    if bits < 8:  # whole bytes, and whole pairs for torch
        shape = [*shape, 4 * draw(st.integers(0, 3))]
    return shape


@st.composite
def files(draw: st.DrawFn, dtypes: list[str] = TORCH_DTYPES, most: int = 6, least: int = 0) -> File:
    """``most``: the largest extent. ``least``: tensors."""
    names = draw(st.lists(NAMES, unique=True, min_size=least, max_size=8))
    entries: list[tuple[str, Any]] = []
    offset = 0
    for name in names:
        dtype = draw(st.sampled_from(dtypes))
        shape = draw(shapes(dtype, most))
        bits = DTYPE_BITS[dtype]
        for extent in shape:
            bits *= extent
        fields = list(entry(dtype, shape, offset, offset + bits // 8).items())
        if draw(st.integers(0, 5)) == 0:
            fields.append((draw(TEXTS.filter(lambda text: text not in entry("", [], 0, 0))), draw(JSON_VALUES)))
        entries.append((name, dict(draw(st.permutations(fields)))))
        offset += bits // 8
    metadata = draw(st.one_of(st.none(), st.just([]), st.lists(st.tuples(TEXTS, TEXTS), max_size=3)))
    if draw(st.booleans()):
        entries.append(("__metadata__", None if metadata is None else dict(metadata)))
    text = write_json(draw, draw(st.permutations(entries)))
    text += b" " * (-len(text) % draw(st.sampled_from([1, 8, 64])))
    return File(text, random.Random(offset).randbytes(offset), names)


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), TEXTS
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def write_json(draw: st.DrawFn, entries: list[tuple[str, Any]]) -> bytes:
    """With whitespace where it may be, and with or without escapes."""
    space, plain = draw(WHITESPACE), draw(st.booleans())
    separators = ("," + space, space + ":" + space)
    parts = [
        json.dumps(name, ensure_ascii=plain)
        + separators[1]
        + json.dumps(value, ensure_ascii=plain, separators=separators)
        for name, value in entries
    ]
    return (space + "{" + space + separators[0].join(parts) + space + "}").encode()


# In place of a number, a string, or null. All of the first are JSON.
OTHER_VALUES = [
    *(str(number) for number in (0, 1, 2, 255, 2**31, 2**53 + 1, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40)),
    *("-1", "-0", "1.0", "1e0", "0.5", "1e-400", "null", "true", "[]", "{}", "[1]", "[0,0]", '{"a":1}'),
    *('"1"', '"f32"', '"\\u0061"', '"\\ud83d\\ude00"', '{"U8":null}', '["U8",[0],[0,0]]', '"a"', '"dtype"', '"shape"'),
    *("[" * 99 + "]" * 99, *(f'"{dtype}"' for dtype in DTYPE_BITS)),
]  # fmt: skip
NO_VALUES = [
    *(
        "01",
        "+1",
        "0x1",
        ".5",
        "1.",
        "NaN",
        "Infinity",
        "1E400",
        "1" + "0" * 400,
        '"\\ud800"',
        '"',
        "nul",
        "True",
        "'a'",
    ),
    *("[" * 126 + "]" * 126, "[" * 200 + "]" * 200, "[" * 5000, "", '"\n"', '"\\x41"', "-", "1e", "1,"),
]
INSERTED = [
    *(b"\xef\xbb\xbf", b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"),
    *(b",", b"{", b"}", b"[", b"]", b":", b'"', b"\x0b", b"/**/", b"//\n", b"'", b"\\", b"\\u0000", b"1", b"-", b"e1"),
]
VALUE = re.compile(rb'(-?\d+|"[^"]*"|null)(?=\s*[,\]}])')  # and no name
ENTRY = re.compile(rb'"[^"{}]*"\s*:\s*\{[^{}]*\}')
MORE_ENTRIES = [
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
    b'"__metadata__":{"a":"b"}',
    b'"x":[[{}]]',
    b'"x":null',
]


def change_value(draw: st.DrawFn, text: bytes, values: list[str]) -> bytes:
    found = list(VALUE.finditer(text))
    if not found:
        return text
    value = draw(st.sampled_from(found))
    return text[: value.start()] + draw(st.sampled_from(values)).encode() + text[value.end() :]


def add_one(draw: st.DrawFn, text: bytes) -> bytes:
    """One more or one less, somewhere."""
    found = list(re.finditer(rb"\d+", text))
    if not found:
        return text
    number = draw(st.sampled_from(found))
    changed = max(0, int(number.group()) + draw(st.sampled_from([-1, 1])))
    return text[: number.start()] + str(changed).encode() + text[number.end() :]


def add_space(draw: st.DrawFn, text: bytes) -> bytes:
    """Whitespace between two tokens, or inside of a name."""
    found = list(re.finditer(rb"[{}:,\[\]]", text))
    at = draw(st.sampled_from(found)).start() if found else 0
    return text[:at] + draw(st.sampled_from([b" ", b"\n", b"\t\r", b"  "])) + text[at:]


def add_entry(draw: st.DrawFn, text: bytes) -> bytes:
    """An entry or a field, often one that is there already."""
    again = [entry.group() for entry in ENTRY.finditer(text)]
    at = text.find(b"{") + 1
    return text[:at] + draw(st.sampled_from(again + MORE_ENTRIES)) + b"," + text[at:]


def change_fields(draw: st.DrawFn, text: bytes) -> bytes:
    """A field once more, one that nobody reads and that may be nested too deep, or a longer or shorter list."""
    found = list(re.finditer(rb'"(dtype|shape|data_offsets)"\s*:\s*("\w*"|\[[^\]]*\])', text))
    if not found:
        return text
    field = draw(st.sampled_from(found))
    more = draw(st.sampled_from(["again", "nested", "longer", "shorter"]))
    depth = draw(st.integers(119, 129))
    nested = b'"x":' + b"[" * depth + b"]" * depth
    changed = {
        "again": field.group() + b"," + field.group(),
        "nested": nested + b"," + field.group(),
        "longer": re.sub(rb"(\d+)(\s*\])", rb"\1,\1\2", field.group()),
        "shorter": re.sub(rb"\d+\s*,", b"", field.group(), count=1),
    }[more]
    return text[: field.start()] + changed + text[field.end() :]


def change_edge(draw: st.DrawFn, text: bytes) -> bytes:
    """Something before the first bracket, or behind the last."""
    added = draw(
        st.sampled_from([b"\xef\xbb\xbf", b"\0", b"\0\0x", b" ", b"\n\t", b"{}", b"}", b",", b"\x0b", b"\xff", text])
    )
    return added + text if draw(st.booleans()) else text + added


def change_bytes(draw: st.DrawFn, text: bytes) -> bytes:
    at = draw(st.integers(0, len(text) - 1)) if text else 0
    changed = draw(st.sampled_from(["insert", "remove", "flip"]))
    if changed == "insert" or not text:
        return text[:at] + draw(st.sampled_from(INSERTED)) + text[at:]
    if changed == "remove":
        return text[:at] + text[at + draw(st.integers(1, 9)) :]
    return text[:at] + bytes([text[at] ^ 1 << draw(st.integers(0, 7))]) + text[at + 1 :]


TEXT_DAMAGES = [
    lambda draw, text: change_value(draw, text, OTHER_VALUES),
    lambda draw, text: change_value(draw, text, NO_VALUES),
    add_one,
    add_space,
    add_entry,
    change_bytes,
    change_fields,
    change_edge,
]
# More of those that leave JSON behind, and more of those that leave the data's length alone.
DAMAGES = st.sampled_from([0, 0, 0, 0, 1, 2, 3, 3, 4, 4, 5, 6, 6, 6, 7, 7, "data", "length", "end"])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The bytes of a file that one to three things have happened to; it may still be valid."""
    file = draw(files(dtypes=list(DTYPE_BITS), least=1))
    text, data, more_length, end = file.json, file.data, 0, None
    for what in draw(st.lists(DAMAGES, min_size=1, max_size=3)):
        if what == "data":
            data = data[: draw(st.integers(0, len(data)))] + bytes(draw(st.integers(0, 9)))
        elif what == "length":
            more_length = draw(st.sampled_from([-9, -1, 1, 8, 100, 10**8, 2**62]))
        elif what == "end":
            end = draw(st.integers(0, 40))
        else:
            text = TEXT_DAMAGES[what](draw, text)
    return file_bytes(text, data, length=max(0, len(text) + more_length))[:end]
