"""``weightload load PATH``: load a checkpoint once, and say how long it took and what held it up."""

from __future__ import annotations

import argparse
import time

import torch

from weightload._load import devices
from weightload._load.iterator import safetensors_weights_iterator
from weightload.cli.common import OK, Commands, add_checkpoint, add_command, bytes_in_words, print_json, resolve, say

DESCRIPTION = """\
Load a checkpoint's tensors one after the other and drop each, as an engine does that copies them into its own memory.
With --touch one byte of every page of CPU tensors is read, which a mapped tensor's user would do.
"""
PAGE = 4096  # bytes


def add(commands: Commands) -> None:
    """Make the command known."""
    command = add_command(
        commands, "load", help="load a checkpoint once, and say where the time went", description=DESCRIPTION
    )
    command.add_argument("--device", default="cpu", help="where to load to, such as cuda:0 (default: cpu)")
    command.add_argument("--backend", choices=("mmap", "pread"), default="mmap", help="of loads to the CPU")
    command.add_argument("--verify", choices=("sha256",), help="check every file's SHA-256 while it is loaded")
    command.add_argument(
        "--cache", metavar="FOLDER", help="of addresses: read copies that are there, and make those that are not"
    )
    command.add_argument("--touch", action="store_true", help="read one byte of each 4 KiB of CPU tensors")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--stats", action="store_true", help="show every stage, how files were read, and the bottleneck")
    form.add_argument("--json", action="store_true", help="print the same as JSON")
    add_checkpoint(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    device = devices.resolve(options.device)
    paths = resolve(options)
    begin = time.perf_counter()
    with safetensors_weights_iterator(
        paths,
        device=device,
        strategy="independent",
        backend=options.backend,
        show_progress=False,
        verify=options.verify,
        cache=options.cache,
    ) as weights:
        for _, tensor in weights:
            if options.touch and tensor.device.type == "cpu":
                touch(tensor)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - begin
    stats = weights.stats()
    if options.json:
        print_json({**stats.as_dict(), "to_the_last_byte_s": seconds})
    elif options.stats:
        for line in str(stats).split("\n"):
            say(line)
    if not options.json:
        rate = f"{stats.bytes / 1e9 / seconds:.2f} GB/s" if stats.bytes else "nothing to load"
        say(f"{stats.tensors} tensors, {bytes_in_words(stats.bytes)} in {seconds:.3f} s, to the last byte: {rate}")
    return OK


def touch(tensor: torch.Tensor) -> None:
    """Read one byte of each page of a contiguous CPU tensor, as the least that its consumer does."""
    tensor.reshape(-1).view(torch.uint8)[::PAGE].sum()
