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
"""

from __future__ import annotations

import argparse
import random
from datetime import datetime, timezone
from pathlib import Path

import torch
from gpu_limits import device_facts
from group_report import print_table, save_plot
from group_run import Comparison, summarise
from group_ways import Place, ways_for
from machine import describe
from ranks import GroupedRanks
from report import deliver

import weightload
from weightload import devices
from weightload.selection import open_files
from weightload.settings import current


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="a safetensors file, an index or a directory")
    parser.add_argument("--subfolder", help="a folder below, such as diffusers' transformer")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--device", help="cpu or cuda; default: this rank's accelerator, or the CPU without one")
    parser.add_argument("--group", choices=("node", "all"), default="node", help="the ranks that load together")
    parser.add_argument("--backend", metavar="NAME", help="torch.distributed's; default: the CPU's and the device's")
    parser.add_argument("--drop-failing", action="store_true", help="ways that fail are left out and said why")
    parser.add_argument("--budget", type=float, default=1e9, metavar="S", help="time after which no round begins")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the order (default: a new one)")
    parser.add_argument("--ways", metavar="NAME,NAME", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    parser.add_argument("--title", help="what to call the checkpoint")
    options = parser.parse_args()
    try:
        options.ways = options.ways and [name.strip() for name in options.ways.split(",")]
        ways_for(torch.device("cpu"), options.ways)
    except ValueError as error:
        parser.error(str(error))
    if options.repeats < 1:
        parser.error("--repeats: at least 1")
    return options


def the_device(name: str | None) -> torch.device:
    """This rank's device: each rank has an accelerator of its own, unless one is named with its number."""
    if name is None or (name != "cpu" and torch.device(name).index is None):
        device = devices.default_device()
        if name not in (None, device.type):
            raise SystemExit(f"--device {name}: torch has no such device here")
    else:
        device = devices.resolve(name)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    return device


def main() -> None:
    """Command line."""
    options = parsed()
    device = the_device(options.device)
    ranks = GroupedRanks(device, whole=options.group == "all", backend=options.backend)
    files = weightload.resolve_safetensors_files(options.model_path, options.subfolder)
    opened = open_files(files)
    tensors = sum(len(file) for file in opened)
    total = sum(file.size - file.data_begin for file in opened)
    del opened

    comparison = Comparison(Place(files, device, ranks.group), ways_for(device, options.ways), ranks, total)
    comparison.check(options.drop_failing)
    seed = ranks.gather(options.seed)[0]
    comparison.measure(options.warmup, options.repeats, seed, options.budget)
    remarks = comparison.cache_remarks()
    result = {
        "benchmark": "weight_loading_comparison",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": options.title or Path(options.model_path).name,
        "files": len(files),
        "tensors": tensors,
        "bytes": total,
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
        "rows": summarise(comparison.timings, total),
    }
    if ranks.first:
        deliver(result, options.json, options.plot, print_table, save_plot)
    ranks.close()


if __name__ == "__main__":
    main()
