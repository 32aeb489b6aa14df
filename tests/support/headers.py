"""Files that break the rules of the format, each with the name of the rule, and files that keep them."""

from __future__ import annotations

from conftest import entry, file_bytes

U8 = entry("U8", [1], 0, 1)


def text(inner: str) -> bytes:
    """A header with one tensor entry given as JSON text."""
    return b'{"a":{' + inner.encode() + b"}}"


GOOD = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'

# name of the rule, the file's bytes
VIOLATIONS = [
    ("HeaderTooSmall", b""),
    ("HeaderTooSmall", b"1234567"),
    ("HeaderTooLarge", file_bytes(b"{}", length=100_000_001)),
    ("HeaderTooLarge", file_bytes(b"{}", length=2**63)),
    ("InvalidHeaderLength", file_bytes(b"{}", length=3)),
    ("InvalidHeaderLength", file_bytes(b"{}", length=100_000_000)),
    ("InvalidHeader", file_bytes(b'{"\xff":{}}')),
    ("InvalidHeader", file_bytes(b'{"\xed\xa0\x80":{}}')),
    ("InvalidHeaderDeserialization", file_bytes(b"")),
    ("InvalidHeaderDeserialization", file_bytes(b"{")),
    ("InvalidHeaderDeserialization", file_bytes(b"[]")),
    ("InvalidHeaderDeserialization", file_bytes(b"null")),
    ("InvalidHeaderDeserialization", file_bytes(b'"a"')),
    ("InvalidHeaderDeserialization", file_bytes(b"{} x")),
    ("InvalidHeaderDeserialization", file_bytes(b"{}\0")),
    ("InvalidHeaderDeserialization", file_bytes(b"{}{}")),
    ("InvalidHeaderDeserialization", file_bytes(b"\xef\xbb\xbf{}")),
    ("InvalidHeaderDeserialization", file_bytes(b'{"\\ud800":{}}')),
    ("InvalidHeaderDeserialization", file_bytes(text(GOOD + ","), b"1")),
    ("InvalidTensorEntry", file_bytes(b'{"a":1}')),
    ("InvalidTensorEntry", file_bytes(b'{"a":null}')),
    ("InvalidTensorEntry", file_bytes(b'{"a":"b"}')),
    ("InvalidTensorEntry", file_bytes(b'{"a":{}}')),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"shape":[1],"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":8,"shape":[1],"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":["U8"],"shape":[1],"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":1,"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":{},"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[[1]],"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[1.0],"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[-1],"data_offsets":[0,1]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[-0],"data_offsets":[0,0]'))),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":["1"],"data_offsets":[0,1]'), b"1")),
    (
        "InvalidTensorEntry",
        file_bytes(text('"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]'), b"1"),
    ),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[1],"data_offsets":[0]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[1],"data_offsets":[0,1,2]'), b"1")),
    ("InvalidTensorEntry", file_bytes(text('"dtype":"U8","shape":[1],"data_offsets":null'), b"1")),
    ("InvalidMetadata", file_bytes({"__metadata__": {"a": 1}})),
    ("InvalidMetadata", file_bytes({"__metadata__": {"a": {}}})),
    ("InvalidMetadata", file_bytes({"__metadata__": []})),
    ("InvalidMetadata", file_bytes({"__metadata__": "text"})),
    ("UnknownDtype", file_bytes({"a": entry("U9", [1], 0, 1)}, b"1")),
    ("UnknownDtype", file_bytes({"a": entry("u8", [1], 0, 1)}, b"1")),
    ("DuplicateField", file_bytes(text('"dtype":"U8",' + GOOD), b"1")),
    ("DuplicateField", file_bytes(text('"shape":[1],' + GOOD), b"1")),
    ("DuplicateField", file_bytes(text('"data_offsets":[0,1],' + GOOD), b"1")),
    ("DuplicateField", file_bytes(b'{"__metadata__":{},"__metadata__":{}}')),
    ("NestingTooDeep", file_bytes(text(GOOD + ',"x":' + "[" * 200 + "]" * 200), b"1")),
    ("InvalidOffset", file_bytes({"a": U8, "b": entry("U8", [1], 2, 3)}, b"123")),
    ("InvalidOffset", file_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [1], 1, 2)}, b"12")),
    ("InvalidOffset", file_bytes({"a": entry("U8", [1], 1, 0)}, b"1")),
    ("InvalidOffset", file_bytes({"a": entry("U8", [1], 1, 2)}, b"12")),
    ("TensorInvalidInfo", file_bytes({"a": entry("U8", [3], 0, 1)}, b"1")),
    ("TensorInvalidInfo", file_bytes({"a": entry("F32", [1], 0, 2)}, b"12")),
    ("ValidationOverflow", file_bytes({"a": entry("F32", [2**40, 2**40], 0, 1)}, b"1")),
    ("ValidationOverflow", file_bytes({"a": entry("F32", [2**40, 2**40, 0], 0, 0)})),
    ("ValidationOverflow", file_bytes({"a": entry("F64", [2**61], 0, 1)}, b"1")),
    ("MisalignedSlice", file_bytes({"a": entry("F4", [3], 0, 1)}, b"1")),
    ("MisalignedSlice", file_bytes({"a": entry("F6_E2M3", [], 0, 1)}, b"1")),
    ("MetadataIncompleteBuffer", file_bytes({"a": U8}, b"12")),
    ("MetadataIncompleteBuffer", file_bytes({"a": entry("U8", [2], 0, 2)}, b"1")),
    ("MetadataIncompleteBuffer", file_bytes({"a": entry("U8", [2**50], 0, 2**50)}, b"1")),
    ("MetadataIncompleteBuffer", file_bytes({}, b"1")),
    ("GitLfsPointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"),
    ("HtmlPage", b"<!DOCTYPE html>\n<html><body>404</body></html>"),
    ("GitLfsPointer", b"version https://hawser.github.com/spec/v1\noid sha256:0123\nsize 12345\n"),
    ("HtmlPage", b"\n  <HTML><head></head></HTML>"),
    ("HtmlPage", b"\xef\xbb\xbf<html></html>"),
    ("HtmlPage", b"<!-- 404 --><html></html>"),
    ("HtmlPage", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    ("InvalidHeaderLength", b"<\0\0\0\0\0\0\0html"),
]

ACCEPTED = [
    file_bytes(b"{}"),
    file_bytes({"__metadata__": None, "a": U8}, b"1"),
    file_bytes({"__metadata__": {}, "a": U8}, b"1"),
    file_bytes({"a": {**U8, "comment": [1, {"deep": [None, True, -1.5, "x"]}]}}, b"1"),
    file_bytes(text(GOOD + ',"x":' + "[" * 100 + "]" * 100), b"1"),
    file_bytes(b"  \n" + text(GOOD) + b" \r\n\t", b"1"),
    file_bytes(text('"data_offsets":[0,1],"shape":[1],"dtype":"U8"'), b"1"),
    file_bytes(b'{"__metadata__":{"k":"1","k":"2"},"a":{' + GOOD.encode() + b"}}", b"1"),
    file_bytes({"\0": U8, "": entry("U8", [0], 1, 1)}, b"1"),
    file_bytes({"b": entry("U8", [1], 1, 2), "a": U8}, b"12"),
    file_bytes({"a": entry("F32", [0, 2**40, 2**40], 0, 0)}),
    file_bytes({"ü/😀": U8}, b"1"),
]
