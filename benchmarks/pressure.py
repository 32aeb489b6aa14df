"""Measures cold loads under pressure: little memory, other readers on the disk, little CPU.

    python benchmarks/pressure.py --model-path MODEL [--other FILE ...] [--rounds 5] [--json FILE]

Every load is the first of a fresh process, in shuffled turns, of files that are not in the page cache: views of mapped
files, and private memory; every page of a tensor is touched, and it is dropped before the next (under a limit of half
the model, all of them could not be held). Once without pressure, then

- in a control group whose memory is half the model and the 400 MB that importing torch takes,
- beside four processes that read other files from the same disk, again and again past the page cache (`--other`; by
  default copies of the model's last file beside it),
- in a control group with a CPU quota of 0.5.

What is told: seconds, and the most memory of the process that is its own (private and anonymous, sampled) beyond what
it had before. Needs root, or a control group that may be divided.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from first_loads import KINDS, against
from harness.machine import describe
from report.compare_summary import by_chance

import weightload

HERE = Path(__file__).resolve().parent
BASE_BYTES = 400 << 20  # of a process that has imported torch
READERS = 4

CHILD = """
import os, sys, threading, time

way, group, files = sys.argv[1], sys.argv[2], sys.argv[3:]
if group:
    with open(os.path.join(group, "cgroup.procs"), "w") as procs:
        procs.write(str(os.getpid()))
import torch
from harness.machine import evict
from loaders.peers import PEERS
import weightload

evict(files)


def own():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0]) * 1024


before, peak, done = own(), [0], threading.Event()


def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], own())


watcher = threading.Thread(target=watch)
watcher.start()
begin = time.perf_counter()
for name, tensor in PEERS[way].load(files, torch.device("cpu")):
    if tensor.nbytes:
        tensor.flatten().view(torch.uint8)[::4096].sum()
    del tensor
took = time.perf_counter() - begin
done.set()
watcher.join()
print(took, max(0, peak[0] - before))
"""

READER = """
import sys
from gpu.limits import direct_read

while True:
    direct_read([sys.argv[1]], threads=1)
"""


def groups_of(controller: str) -> Path | None:
    """The folder of this process's own control group, for a controller."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for _, root, kind, options, *_ in (line.split() for line in Path("/proc/self/mounts").read_text().splitlines()):
        if kind == "cgroup" and controller in options.split(","):
            name = next(name for name in groups if controller in name.split(","))
            return Path(root + groups[name])
        if kind == "cgroup2" and controller in (Path(root) / "cgroup.controllers").read_text().split():
            return Path(root + groups.get("", "/"))
    return None


@contextlib.contextmanager
def control_group(controller: str, limits: dict[str, str]) -> Iterator[Path]:
    """A group below this process's own, with the first file of ``limits`` that is there set to its value.

    Raises:
        OSError: it cannot be made, or takes no limit.
    """
    own = groups_of(controller)
    if own is None:
        raise OSError(f"no control groups with {controller!r} here")
    made = Path(tempfile.mkdtemp(prefix="weightload-bench-", dir=own))
    try:
        name = next((name for name in limits if (made / name).exists()), None)
        if name is None:
            raise OSError(f"{made} has none of {', '.join(limits)}")
        (made / name).write_text(limits[name])
        yield made
    finally:
        made.rmdir()


@contextlib.contextmanager
def readers(files: list[str]) -> Iterator[None]:
    """Processes that read these files for as long as this lasts."""
    environ = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    started = [subprocess.Popen([sys.executable, "-c", READER, file], env=environ) for file in files]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@contextlib.contextmanager
def others_of(files: list[str], given: list[str]) -> Iterator[list[str]]:
    """The files that the readers read: as given, or copies of the last file, on the disk of the model."""
    if given:
        yield [given[number % len(given)] for number in range(READERS)]
        return
    with tempfile.TemporaryDirectory(dir=Path(files[0]).parent.parent) as folder:
        yield [shutil.copyfile(files[-1], Path(folder, str(number))).as_posix() for number in range(READERS)]


def run(way: str, group: Path | None, files: list[str]) -> tuple[float, int]:
    """Seconds, and bytes of memory of its own at most."""
    environ = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, "-c", CHILD, way, str(group or ""), *files]
    done = subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise OSError(f"{way}: {said[-1] if said else f'ended by signal {-done.returncode}'}")
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def measure(group: Path | None, files: list[str], rounds: int) -> dict[str, list[tuple[float, int]]]:
    found: dict[str, list[tuple[float, int]]] = {way: [] for pair in KINDS.values() for way in pair}
    for _ in range(rounds):
        for way in random.sample(list(found), len(found)):
            found[way].append(run(way, group, files))
    return found


def show(pressure: str, found: dict[str, list[tuple[float, int]]]) -> None:
    for kind, (them, us) in KINDS.items():
        seconds = {way: [took for took, _ in found[way]] for way in (them, us)}
        peaks = {way: statistics.median(peak for _, peak in found[way]) / 1e6 for way in (them, us)}
        theirs, ours = statistics.median(seconds[them]), statistics.median(seconds[us])
        times = against(seconds[them], seconds[us])
        lost = " LOST" if ours > theirs and by_chance(seconds[us], seconds[them]) < 0.05 else ""
        print(
            f"{pressure:24} {kind:8} {theirs:8.3f} s {ours:8.3f} s {times:>7}{lost}   "
            f"own memory {peaks[them]:6.0f} MB {peaks[us]:6.0f} MB",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=os.path.abspath, required=True)
    parser.add_argument("--other", nargs="*", default=[], metavar="FILE", help="what the other readers read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    files = weightload.resolve_safetensors_files(options.model_path)
    size = sum(map(os.path.getsize, files))
    memory = str(size // 2 + BASE_BYTES)
    rows: list[dict[str, Any]] = []
    print(
        f"Cold loads, {size / 1e9:.2f} GB in {len(files)} files, medians of {options.rounds}: safetensors, weightload"
    )
    with others_of(files, options.other) as others:
        pressures: dict[str, contextlib.AbstractContextManager[Path | None]] = {
            "none": contextlib.nullcontext(None),
            "half the memory": control_group("memory", {"memory.max": memory, "memory.limit_in_bytes": memory}),
            f"{READERS} other readers": readers(others),
            "a CPU quota of 0.5": control_group("cpu", {"cpu.max": "50000 100000", "cpu.cfs_quota_us": "50000"}),
        }
        for pressure, manager in pressures.items():
            try:
                with manager as group:
                    found = measure(group, files, options.rounds)
            except OSError as problem:
                print(f"{pressure:24} not measured: {problem}")
                rows.append({"pressure": pressure, "reason": str(problem)})
                continue
            show(pressure, found)
            rows.append({"pressure": pressure, "loads": found})
    if options.json:
        result = {**describe(files), "benchmark": "pressure", "bytes": size, "files": len(files), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
