"""``weightload verify PATH``: every rule of the format, every byte."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from weightload._api.files import load_file
from weightload._base.addresses import is_address, shown
from weightload._checkpoint.resolve import check_contents, find_files
from weightload._checkpoint.selection import open_files
from weightload._verify.checker import check
from weightload._verify.digests import expected_digests
from weightload.cli.common import (
    BROKEN,
    OK,
    UNUSABLE,
    Commands,
    add_checkpoint,
    add_command,
    bytes_in_words,
    say,
    tell_warning,
)
from weightload.errors import AddressError, WeightLoadError


def add(commands: Commands) -> None:
    """Make the command known."""
    command = add_command(
        commands,
        "verify",
        help="check every rule of the format and read every byte",
        description="Check every rule of the format and read every byte. Goes on after a bad file.",
    )
    command.add_argument(
        "--parity",
        action="store_true",
        help="load with safetensors too, and compare every tensor bit for bit",
    )
    command.add_argument(
        "--sha256",
        action="store_true",
        help="compare each file's SHA-256 with what the hub, or a SHA256SUMS beside the file, says",
    )
    add_checkpoint(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    worst = OK
    found = find_files(options.path, options.subfolder, options.variant)
    if found.passed_over:
        tell_warning(found.passed_over)
    for path in found.files:
        try:
            (file,) = open_files([path])
            if options.sha256:
                (expected,) = expected_digests([str(path)], "sha256")
                check(file, expected)  # which reads every byte
                done = f"{len(file)} tensors, {bytes_in_words(file.size)} read, its SHA-256 is right"
            else:
                done = f"{len(file)} tensors, {bytes_in_words(file.read_all())} read"
            if options.parity:
                done += f", {_compare(path)} tensors equal to safetensors'"
            say(f"ok   {file.path}: {done}")
        except AddressError:
            raise
        except (SafetensorError, OSError) as error:
            say(f"BAD  {error}")
            worst = max(worst, UNUSABLE if isinstance(error, (OSError, MemoryError)) else BROKEN)
    if worst == OK:
        check_contents(found)
    return worst


def _compare(path: Path | str) -> int:
    """Load a file with both libraries; the number of tensors, all equal in name, dtype, shape and bytes."""
    import torch
    from safetensors.torch import load_file as reference_load_file

    if is_address(path):
        raise WeightLoadError(f"{shown(str(path))}: --parity compares local files only")
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
