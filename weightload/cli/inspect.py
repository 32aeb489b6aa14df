"""``weightload inspect PATH``: what a checkpoint's headers say."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from weightload import _C
from weightload._checkpoint.selection import open_files
from weightload.cli.common import OK, Commands, add_checkpoint, add_command, bytes_in_words, print_json, resolve, say


def add(commands: Commands) -> None:
    """Make the command known."""
    command = add_command(
        commands,
        "inspect",
        help="show files, tensors, dtypes, bytes and metadata",
        description="Show a checkpoint's files, tensors, dtypes, bytes and metadata. Reads headers only.",
    )
    command.add_argument("--tensors", action="store_true", help="list every tensor")
    command.add_argument("--json", action="store_true", help="print JSON, with every tensor")
    add_checkpoint(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    paths = resolve(options)
    files = [_describe(file) for file in open_files(paths)]
    if options.json:
        print_json({"files": files, **_totals(files)})
        return OK
    for file in files:
        say(f"{file['path']}: {len(file['tensors'])} tensors, {bytes_in_words(file['bytes'])}")
        for key, value in (file["metadata"] or {}).items():
            say(f"  {key}: {value}")
        if options.tensors:
            for tensor in file["tensors"]:
                say(f"  {tensor['name']}  {tensor['dtype']}  {tensor['shape']}  {bytes_in_words(tensor['bytes'])}")
    totals = _totals(files)
    dtypes = ", ".join(f"{name} {count}" for name, count in totals["dtypes"].items())
    size = bytes_in_words(totals["tensor_bytes"])
    say(f"total: {len(files)} files, {totals['tensor_count']} tensors ({dtypes}), {size}")
    return OK


def _describe(file: _C.CheckpointFile) -> dict[str, Any]:
    tensors = [
        {"name": name, "dtype": dtype, "shape": list(shape), "offset": begin, "bytes": end - begin}
        for name, dtype, shape, begin, end in file.tensors()
    ]
    return {"path": file.path, "bytes": file.size, "metadata": file.metadata, "tensors": tensors}


def _totals(files: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = [tensor for file in files for tensor in file["tensors"]]
    return {
        "tensor_count": len(tensors),
        "tensor_bytes": sum(tensor["bytes"] for tensor in tensors),
        "dtypes": dict(Counter(tensor["dtype"] for tensor in tensors).most_common()),
    }
