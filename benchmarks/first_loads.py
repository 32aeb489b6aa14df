"""Measures the first load of a fresh process, on memory as it comes and on memory that was touched a moment before.

    python benchmarks/first_loads.py --model-path MODEL [--rounds 5] [--old CHECKOUT] [--verify sha256] [--json FILE]

A server loads a model once, in a fresh process, on whatever memory the machine has. Eight cells: files in the page
cache or not, memory as it comes or touched by another process a moment before, and views of mapped files (against
safe_open's get_tensor) or private memory (against a clone of that). Every loader runs in a process of its own, in
shuffled turns; it is timed until every page of every tensor has been touched and all are held. A ratio in brackets is
one that an exact rank-sum test (5 %) cannot tell from 1.

`--old` is a folder with another commit, its extension built in place: it runs in the same turns. `--verify` adds loads
that check whole files by these digests while they load, and says how many times as long they take.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from harness.machine import commit_of, describe
from report.compare_summary import by_chance

from weightload._verify import hashes
from weightload._verify.digests import KINDS as DIGESTS

HERE = Path(__file__).resolve().parent.parent

CHILD = """
import json, sys, time
import torch
from harness.machine import back_memory_elsewhere, evict, fill_cache
from safetensors import safe_open
import weightload

way, cache, memory, checkout, verify, files = *sys.argv[1:6], sys.argv[6:]
assert weightload.__file__.startswith(checkout), weightload.__file__
digests = json.loads(verify)
if any(":" in digest for digest in digests.values()):
    import awscrt.checksums
if cache == "cold":
    evict(files)
else:
    fill_cache(files)
if memory != "as it comes":
    import os
    back_memory_elsewhere(2 * sum(map(os.path.getsize, files)))


def safetensors():
    for file in files:
        with safe_open(file, "pt", device="cpu") as handle:
            for name in handle.keys():
                yield name, handle.get_tensor(name)


def iterate(backend):
    how = {"verify": digests} if digests else {}
    return weightload.safetensors_weights_iterator(files, to_cpu=True, backend=backend, show_progress=False, **how)


WAYS = {
    "safetensors": safetensors,
    "safetensors clone": lambda: ((name, tensor.clone()) for name, tensor in safetensors()),
    "weightload": lambda: iterate("mmap"),
    "weightload pread": lambda: iterate("pread"),
}
begin = time.perf_counter()
held = {}
for name, tensor in WAYS[way]():
    if tensor.nbytes:
        tensor.flatten().view(torch.uint8)[::4096].sum()
    held[name] = tensor
print(time.perf_counter() - begin)
"""

# Competitors in each kind of memory, the one to beat first.
KINDS = {"mapped": ("safetensors", "weightload"), "private": ("safetensors clone", "weightload pread")}
CACHES = ("warm", "cold")
MEMORIES = ("as it comes", "touched before")


class Arm(NamedTuple):
    """One competitor of a cell."""

    way: str
    checkout: Path = HERE
    digests: Mapping[str, str] = MappingProxyType({})
    """By file's name; those to check."""


def digests_of(kind: str, files: list[str]) -> dict[str, str]:
    """The digests of files, as `verify=` takes them."""
    found = {}
    for file in files:
        digest = hashes.new(kind)
        with open(file, "rb") as opened:
            while piece := opened.read(8 << 20):
                digest.update(piece)
        found[os.path.basename(file)] = digest.hexdigest() if kind == "sha256" else f"{kind}:{digest.hexdigest()}"
    return found


def run(arm: Arm, cache: str, memory: str, files: list[str]) -> float:
    """Seconds of the first load of a process."""
    way, checkout = arm.way, arm.checkout
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(HERE / "benchmarks")])}
    command = [sys.executable, "-c", CHILD, way, cache, memory, str(checkout), json.dumps(dict(arm.digests)), *files]
    done = subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def arms_of(old: Path | None, verify: list[str], files: list[str]) -> dict[str, Arm]:
    """All that run, by name."""
    arms = {way: Arm(way) for ways in KINDS.values() for way in ways}
    ours = [way for way in arms if way.startswith("weightload")]
    if old is not None:
        arms |= {f"{way} (old)": Arm(way, old) for way in ours}
    for kind in verify:
        digests = digests_of(kind, files)
        arms |= {f"{way}, {kind}": Arm(way, digests=digests) for way in ours}
    return arms


def measure(cache: str, memory: str, files: list[str], rounds: int, arms: dict[str, Arm]) -> dict[str, list[float]]:
    """Seconds of each arm in one state of the page cache and of memory; "(old)" are those of the other commit."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name in random.sample(list(arms), len(arms)):
            seconds[name].append(run(arms[name], cache, memory, files))
    return seconds


def against(theirs: list[float], ours: list[float]) -> str:
    """How many times as fast as theirs ours is, by medians; in brackets where that may be chance."""
    ratio = f"{statistics.median(theirs) / statistics.median(ours):.2f}"
    return ratio if by_chance(ours, theirs) < 0.05 else f"({ratio})"


def lines(cache: str, memory: str, seconds: dict[str, list[float]]) -> list[str]:
    """The printed lines of one state."""
    found = []
    for kind, (them, us) in KINDS.items():
        ours, theirs = seconds[us], seconds[them]
        line = f"{cache:5} {memory:15} {kind:8} {statistics.median(theirs):8.3f} s {statistics.median(ours):8.3f} s"
        line += f" {against(theirs, ours):>7}   best {min(theirs):.3f} {min(ours):.3f}"
        if f"{us} (old)" in seconds:
            old = seconds[f"{us} (old)"]
            line += f"   old {statistics.median(old):.3f} {against(old, ours):>7}"
        found.append(line)
        for name, checked in seconds.items():
            if name.startswith(f"{us}, "):
                median = f"{statistics.median(checked):.3f} s, {against(checked, ours)} times as long"
                found.append(f"{'':25} checked by {name.removeprefix(f'{us}, '):10} {median}")
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=os.path.abspath, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--old", type=os.path.abspath)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=MEMORIES)
    parser.add_argument("--verify", nargs="+", choices=list(DIGESTS), default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    old = options.old and Path(options.old)
    files = sorted(map(str, Path(options.model_path).glob("*.safetensors")))
    if not files:
        sys.exit(f"{options.model_path}: no safetensors files")
    size = sum(map(os.path.getsize, files))
    print(f"First load of a process, {size / 1e9:.2f} GB in {len(files)} files, medians of {options.rounds}:")
    print(f"{'cache':5} {'memory':15} {'':8} {'safetensors':>10} {'weightload':>10} {'times':>5}")
    arms, cells = arms_of(old, options.verify, files), []
    for memory in options.memories:
        for cache in options.caches:
            seconds = measure(cache, memory, files, options.rounds, arms)
            cells.append({"cache": cache, "memory": memory, "seconds": seconds})
            print("\n".join(lines(cache, memory, seconds)), flush=True)
    if options.json:
        result: dict[str, Any] = {**describe(files), "bytes": size, "files": len(files), "cells": cells}
        result["old"] = old and commit_of(old)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
