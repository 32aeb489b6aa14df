"""Compares two builds of weightload, side by side in one run: whether a change has made loads slower.

    python benchmarks/old_and_new.py --old CHECKOUT --model-path MODEL [--model-path MODEL ...] [--rounds 7]
        [--loads 5] [--json FILE]

CHECKOUT is a folder with another commit, its extension built in place (`python setup.py build_ext --inplace`); "new" is
the checkout that this file is in. Processes of both take turns, in shuffled order. Each loads once, which is a figure
of its own, and then `--loads` times, of which the median counts. The files are in the page cache. A ratio in brackets
is one that an exact rank-sum test (5 %) cannot tell from 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu.limits import environment
from harness.machine import commit_of
from report.compare_summary import by_chance

HERE = Path(__file__).resolve().parent.parent

# A load is timed until every page of every tensor has been touched, and all are held.
CHILD = """
import json, sys, time
import torch, weightload

checkout, way, loads, files = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
assert weightload.__file__.startswith(checkout), weightload.__file__


def touch(tensor):
    if tensor.nbytes:
        tensor.flatten().view(torch.uint8)[::4096].sum()


def iterate(backend):
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend=backend, show_progress=False)
    return dict(weights)


def handles(backend):
    held = {}
    for file in files:
        with weightload.safe_open(file, backend=backend) as handle:
            held.update((name, handle.get_tensor(name)) for name in handle.keys())
    return held


WAYS = {
    "mapped": lambda: iterate("mmap"), "private": lambda: iterate("pread"),
    "handle, mapped": lambda: handles("mmap"), "handle, private": lambda: handles("pread"),
    "parameters": lambda: weightload.load_into(target, files, show_progress=False) and target,
}
target = {name: torch.empty_like(tensor) for name, tensor in iterate("mmap").items()} if way == "parameters" else {}
for tensor in target.values():
    tensor.view(torch.uint8).fill_(1) if tensor.dim() else None
seconds = []
for _ in range(1 + loads):
    begin = time.perf_counter()
    held = WAYS[way]()
    if way != "parameters":
        for tensor in held.values():
            touch(tensor)
    seconds.append(time.perf_counter() - begin)
    del held
print(json.dumps(seconds))
"""
WAYS = ("mapped", "private", "parameters", "handle, mapped", "handle, private")


def run(checkout: Path, way: str, loads: int, files: list[str]) -> list[float]:
    """Seconds of the loads of one process."""
    environ = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", CHILD, str(checkout), way, str(loads), *files]
    done = subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {way}: {done.stderr.strip().splitlines()[-1]}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def compare(old: Path, way: str, files: list[str], rounds: int, loads: int) -> dict[str, Any]:
    """The figures of one way of loading."""
    first: dict[str, list[float]] = {"old": [], "new": []}
    later: dict[str, list[float]] = {"old": [], "new": []}
    for _ in range(rounds):
        for which in random.sample(["old", "new"], 2):
            seconds = run(old if which == "old" else HERE, way, loads, files)
            first[which].append(seconds[0])
            later[which].append(statistics.median(seconds[1:]))
    return {"way": way, "first": first, "later": later}


def words(figures: dict[str, list[float]]) -> str:
    """Both medians and their ratio: above 1, the new one is faster."""
    old, new = statistics.median(figures["old"]), statistics.median(figures["new"])
    ratio = f"{old / new:.2f}"
    told = by_chance(figures["old"], figures["new"]) < 0.05
    return f"{old * 1e3:9.2f} ms {new * 1e3:9.2f} ms  {ratio if told else f'({ratio})'}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=os.path.abspath, required=True)
    parser.add_argument("--model-path", type=os.path.abspath, action="append", required=True)
    parser.add_argument("--ways", default="; ".join(WAYS), help="of these, separated by semicolons: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    old = Path(options.old)
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu"), []),
        "old": commit_of(old),
        "new": commit_of(HERE),
        "models": [],
    }
    print(f"old: {result['old']}, new: {result['new']}; medians of {options.rounds} processes each")
    for model in options.model_path:
        files = sorted(map(str, Path(model).glob("*.safetensors")))
        for file in files:
            Path(file).read_bytes()  # into the page cache
        rows = []
        print(f"\n{Path(model).name}: {sum(map(os.path.getsize, files)) / 1e9:.2f} GB")
        for way in options.ways.split("; "):
            rows.append(compare(old, way, files, options.rounds, options.loads))
            print(f"{way:16} first {words(rows[-1]['first'])}   later {words(rows[-1]['later'])}", flush=True)
        result["models"].append({"model": Path(model).name, "rows": rows})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
