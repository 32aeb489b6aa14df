"""Tries settings of loads to an accelerator, one after another, and says where each load's time went.

    python benchmarks/gpu/settings.py --model-path MODEL [--device cuda:0] [--cold] [--rounds 3] [--budget S]
        [--trial threads=8,slot_bytes=4194304 ...] [--json FILE]

The first row is the first load of the process, with nothing allocated on the device and nothing page-locked; "memory
given back" is a later load whose blocks come from the driver again. The other rows take turns, with blocks that torch
keeps.
A load ends when the device is idle. Its tensors are kept in a dict until then; no bytes are compared: tests do that.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from harness.machine import evict, fill_cache
from loaders.worker import a_device

import weightload
from gpu.limits import environment

MIB = 1 << 20
TRIALS: list[dict[str, Any]] = [
    {},
    *({"threads": threads} for threads in (8, 12, 14, 15)),
    *({"cached_pinned_bytes": ring * MIB} for ring in (32, 128, 256)),
    *({"device_block_bytes": block * MIB} for block in (256, 512)),
    {"threads": 14, "device_block_bytes": 256 * MIB},
]
COLD_TRIALS: list[dict[str, Any]] = [{}, {"read": "direct"}, {"read": "buffered"}, {"threads": 32}]


def words(trial: dict[str, Any]) -> str:
    """Name a trial's settings as one would write them."""
    shown = {k: f"{v // MIB}M" if isinstance(v, int) and v >= MIB else v for k, v in trial.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items()) or "defaults"


def load(files: list[str], device: torch.device, trial: dict[str, Any]) -> dict[str, Any]:
    """Seconds until all bytes are on the device, and the load's own count of them."""
    torch.accelerator.synchronize(device)
    with weightload.settings.override(**trial):
        begin = time.perf_counter()
        weights = weightload.safetensors_weights_iterator(files, device=device)
        tensors = dict(weights)
        handed_out = time.perf_counter() - begin
        torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - begin
    stats = weights.stats()
    total = sum(tensor.nbytes for tensor in tensors.values())
    tensors.clear()
    return {
        "seconds": seconds,
        "handed_out_s": handed_out,
        "gb_per_s": total / 1e9 / seconds,
        "threads": stats.threads,
        "stages_s": {name: round(stage.seconds, 4) for name, stage in stats.stages.items()},
        "direct_bytes": stats.direct_bytes,
    }


def line(name: str, loads: list[dict[str, Any]]) -> str:
    """The median, and the median load's stages: thread seconds, or of the iterating thread."""
    middle = sorted(loads, key=lambda load: load["seconds"])[len(loads) // 2]
    rate = statistics.median(load["gb_per_s"] for load in loads)
    parts = " ".join(f"{name} {seconds:.3f}" for name, seconds in middle["stages_s"].items() if seconds >= 0.001)
    read = f"{middle['threads']} threads, direct {middle['direct_bytes'] / 1e9:.1f} GB"
    return f"{name:24} {rate:6.2f} GB/s {middle['seconds']:.3f} s | {read} | {parts}"


def parse_trial(text: str) -> dict[str, Any]:
    pairs = (part.split("=") for part in text.split(",") if part)
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--device", type=a_device, default="cuda:0")
    parser.add_argument("--cold", action="store_true", help="evict the files from the page cache before every load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=1e9, metavar="S", help="no load begins after so many seconds")
    parser.add_argument("--trial", action="append", type=parse_trial, metavar="NAME=VALUE,...", help="instead of ours")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    files = weightload.resolve_safetensors_files(options.model_path)
    device = options.device
    torch.zeros(1, device=device)
    end = time.monotonic() + options.budget
    fill_cache(files)
    facts = {"benchmark": "gpu_settings", "cache": "cold" if options.cold else "warm", **environment(device, files)}
    rows: dict[str, list[dict[str, Any]]] = {}

    def one(name: str, trial: dict[str, Any]) -> None:
        if time.monotonic() < end:
            if options.cold:
                evict(files)
            rows.setdefault(name, []).append(load(files, device, trial))
            gc.collect()
            if options.json:  # whoever stops this has what was measured until then
                options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")

    one("first load", {})
    trials = options.trial or (COLD_TRIALS if options.cold else TRIALS)
    for _ in range(options.rounds):
        for trial in trials:
            one(words(trial), trial)
        torch.accelerator.empty_cache()
        one("memory given back", {})
    for name, loads in rows.items():
        print(line(name, loads))


if __name__ == "__main__":
    main()
