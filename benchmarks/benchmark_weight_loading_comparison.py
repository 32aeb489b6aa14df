"""Compares the ways in which several ranks can load one checkpoint, side by side in one process group.

    torchrun --nproc-per-node 2 benchmarks/benchmark_weight_loading_comparison.py --model-path MODEL
        [--subfolder NAME] [--warmup 1] [--repeats 5] [--device cpu] [--group node] [--backend NAME]
        [--ways NAME,NAME] [--json FILE] [--plot FILE] [--title NAME]

Also under `torchrun --nnodes=2`, and plainly as one rank. Every rank wants all tensors: each reads for itself, or one
rank of a group (by default the ranks of a node) reads and the others receive, or each reads a share. The tensors are
kept in a dict; on the CPU one byte of each 4 KiB page of every tensor is read as it is yielded, on an accelerator the
time runs until all have arrived. Ways and limits take turns in every round, shuffled each time; all ranks begin
together, and a load's time is that of the slowest. The page cache is warm, which is verified before every run. Before
that, every way's tensors are compared with safetensors' on every rank, byte for byte.

The table goes to stdout; stderr says what is being done, and how far that is.
"""

from __future__ import annotations

import argparse
import random
import warnings
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist
from gpu.limits import device_facts
from harness.command_line import Parser, Steps, checkpoint_of, run, say, usable_device
from harness.group_run import Comparison, summarise
from harness.machine import describe
from harness.ranks import GroupedRanks
from loaders.group_ways import Place, Weights, python_broadcast, python_mapped, ways_for
from report.group_report import print_table, save_plot
from report.results import deliver

from weightload._load import devices
from weightload.settings import current


def load_independent(files: list[str], device: torch.device | str) -> Weights:
    """For programs that import it: every rank reads every tensor with safetensors (CPU: views of the files)."""
    yield from python_mapped(Place(files, torch.device(device), None))


def load_broadcast(files: list[str], device: torch.device | str, node_group: Any, async_op: bool = False) -> Weights:
    """For programs that import it: one rank reads every tensor with safetensors, and broadcasts it to the others.

    Args:
        files: the same on all ranks, which all read the headers.
        device: of this rank.
        node_group: a ``ProcessGroup``, an object with one as its ``device_group`` (FastVideo's, vLLM's), or None for
            all ranks; where torch.distributed is not initialised this process loads alone.
        async_op: start all broadcasts of a file before the first of its tensors is waited for and yielded.
    """
    if not dist.is_initialized():
        return load_independent(files, device)
    place = Place(files, torch.device(device), getattr(node_group, "device_group", node_group))
    return python_broadcast(place, async_op)


def parsed() -> tuple[Parser, argparse.Namespace]:
    parser = Parser(__doc__)
    parser.add_argument(
        "--device", type=usable_device, help="cpu or cuda; default: this rank's accelerator, or the CPU without one"
    )
    parser.add_argument("--group", choices=("node", "all"), default="node", help="the ranks that load together")
    parser.add_argument("--backend", metavar="NAME", help="torch.distributed's; default: the CPU's and the device's")
    parser.add_argument("--drop-failing", action="store_true", help="ways that fail are left out and said why")
    parser.add_argument("--budget", type=float, default=1e9, metavar="S", help="time after which no round begins")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the order (default: a new one)")
    parser.add_argument("--ways", metavar="NAME,NAME", help="default: all")
    options = parser.parse_args()
    try:
        options.ways = options.ways and [name.strip() for name in options.ways.split(",")]
        ways_for(torch.device("cpu"), options.ways)
        options.device = the_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    return parser, options


def the_device(named: torch.device | None) -> torch.device:
    """This rank's device: each rank has an accelerator of its own, unless one is named with its number."""
    if named is None or (named.type != "cpu" and named.index is None):
        device = devices.default_device()
    else:
        device = devices.resolve(named)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    return device


def ranks_of(parser: Parser, options: argparse.Namespace) -> GroupedRanks:
    whole = options.group == "all"
    if options.backend is None:
        return GroupedRanks(options.device, whole)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a backend that torch then refuses
            return GroupedRanks(options.device, whole, options.backend)
    except Exception as error:  # torch has an AssertionError for a name it does not know
        parser.error(f"--backend {options.backend}: {str(error).splitlines()[0]}")


def main() -> None:
    """Command line."""
    parser, options = parsed()
    device: torch.device = options.device
    ranks = ranks_of(parser, options)
    checkpoint = checkpoint_of(parser, options, ranks)
    files = checkpoint.files
    if ranks.first:
        say(f"{checkpoint}; to {device}, by {ranks.count} rank(s) in groups of {ranks.group_size}")

    ways = ways_for(device, options.ways)
    comparison = Comparison(Place(files, device, ranks.group), ways, ranks, checkpoint.bytes)
    steps = Steps(2)
    with steps.next("comparing bytes with safetensors", len(ways)) as advance:
        comparison.check(options.drop_failing, advance)
    seed = ranks.gather(options.seed)[0]
    with steps.next("warm page cache", (options.warmup + options.repeats) * len(comparison.timings)) as advance:
        comparison.measure(options.warmup, options.repeats, seed, options.budget, advance)
    remarks = comparison.cache_remarks()
    result = {
        "benchmark": "weight_loading_comparison",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": checkpoint.title,
        "files": len(files),
        "tensors": checkpoint.tensors,
        "bytes": checkpoint.bytes,
        "ranks": ranks.count,
        "nodes": ranks.nodes,
        "group": options.group,
        "group_ranks": ranks.group_size,
        "backend": ranks.backend,
        **({"device": "cpu"} if device.type == "cpu" else device_facts(device)),
        "threads": current().thread_count(),
        **describe(files),
        "cache": "warm",
        "cache_verified": not remarks,
        "cache_remarks": remarks,
        "identical_bytes": True,  # the check above ends the run otherwise, or drops the way
        "dropped": comparison.dropped,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "seed": seed,
        "rows": summarise(comparison.timings, checkpoint.bytes),
    }
    if ranks.first:
        deliver(result, options.json, options.plot, print_table, save_plot)
    ranks.close()


if __name__ == "__main__":
    run(main)
