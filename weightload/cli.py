"""The command line: ``weightload inspect PATH`` and ``weightload verify PATH``."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from weightload import _C, __version__
from weightload.checkpoint import check_contents, find_files, resolve_safetensors_files
from weightload.selection import open_files

OK, BROKEN, UNUSABLE = 0, 1, 3

EPILOG = """\
PATH is a safetensors file, an index (*.safetensors.index.json) or a directory.

exit codes:
  0  all is well
  1  the checkpoint breaks a rule of the format, or its bytes differ
  2  wrong usage
  3  PATH, or a file it calls for, is missing or cannot be read
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has seen enough. What is still buffered must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except SafetensorError as error:
        _say(f"weightload: {error}", sys.stderr)
        return UNUSABLE if isinstance(error, OSError) else BROKEN
    except (OSError, MemoryError) as error:
        _say(f"weightload: {error}", sys.stderr)
        return UNUSABLE


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="weightload",
        description="Look into safetensors checkpoints.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"weightload {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect",
        help="show files, tensors, dtypes, bytes and metadata",
        description="Show a checkpoint's files, tensors, dtypes, bytes and metadata. Reads headers only.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="print JSON, with every tensor")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify",
        help="check every rule of the format and read every byte",
        description="Check every rule of the format and read every byte. Goes on after a bad file.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    verify.add_argument(
        "--parity",
        action="store_true",
        help="load with safetensors too, and compare every tensor bit for bit",
    )
    verify.set_defaults(run=_verify)

    for command in (inspect, verify):
        command.add_argument("path", metavar="PATH", help="a file, an index or a directory")
        command.add_argument("--subfolder", help="a folder below PATH, such as diffusers' transformer")
        command.add_argument("--variant", help="load the files of this variant, such as fp16")
    return parser


def _say(line: str, file: TextIO | None = None) -> None:
    """Print a line. Names out of files may hold anything: what would break the line or steer a terminal is escaped."""
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(line, file=file)


def _inspect(options: argparse.Namespace) -> int:
    paths = resolve_safetensors_files(options.path, options.subfolder, options.variant)
    files = [_describe(file) for file in open_files(paths)]
    if options.json:
        print(json.dumps({"files": files, **_totals(files)}, indent=2))
        return OK
    for file in files:
        _say(f"{file['path']}: {len(file['tensors'])} tensors, {_bytes(file['bytes'])}")
        for key, value in (file["metadata"] or {}).items():
            _say(f"  {key}: {value}")
        if options.tensors:
            for tensor in file["tensors"]:
                _say(f"  {tensor['name']}  {tensor['dtype']}  {tensor['shape']}  {_bytes(tensor['bytes'])}")
    totals = _totals(files)
    dtypes = ", ".join(f"{name} {count}" for name, count in totals["dtypes"].items())
    _say(f"total: {len(files)} files, {totals['tensor_count']} tensors ({dtypes}), {_bytes(totals['tensor_bytes'])}")
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


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _verify(options: argparse.Namespace) -> int:
    worst = OK
    paths, promised = find_files(options.path, options.subfolder, options.variant)
    for path in paths:
        try:
            (file,) = open_files([path])
            done = f"{len(file)} tensors, {_bytes(file.read_all())} read"
            if options.parity:
                done += f", {_compare(path)} tensors equal to safetensors'"
            _say(f"ok   {path}: {done}")
        except (SafetensorError, OSError) as error:
            _say(f"BAD  {error}")
            worst = max(worst, UNUSABLE if isinstance(error, OSError) else BROKEN)
    if worst == OK:
        check_contents(paths, promised)
    return worst


def _compare(path: Path) -> int:
    """Load a file with both libraries; the number of tensors, all equal in name, dtype, shape and bytes."""
    import torch
    from safetensors.torch import load_file as reference_load_file

    from weightload.api import load_file
    from weightload.errors import WeightLoadError

    reference = reference_load_file(path)
    ours = load_file(path)
    if set(ours) != set(reference):
        raise WeightLoadError(f"{path}: safetensors finds other tensors: {sorted(set(ours) ^ set(reference))[:5]}")
    for name, tensor in ours.items():
        other = reference[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            raise WeightLoadError(f"{path}: tensor `{name}`: safetensors gives another dtype or shape")
        if not torch.equal(_raw(tensor), _raw(other)):
            raise WeightLoadError(f"{path}: tensor `{name}`: safetensors gives other bytes")
    return len(ours)


def _raw(tensor: Any) -> Any:
    import torch

    return tensor.reshape(-1).view(torch.uint8)
