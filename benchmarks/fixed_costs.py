"""Measures what a load costs before its first byte: import, header, the making of a tensor, and a handle's calls.

    python benchmarks/fixed_costs.py [--json FILE]

The tensor's cost is that of a drained iterator over 20,000 small tensors, with the time to open the file taken off.
Giving memory back: 1 GB of private memory that is kept when its tensors are gone, in a process of its own.
Handles are safe_open's, ours and safetensors' in turn: opening a file of 20,000 small tensors and one of a single
tensor, and opening with get_tensor of every key, none touched.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness.machine import describe
from safetensors import safe_open

import weightload
from weightload._checkpoint.selection import open_files


def import_milliseconds(module: str) -> float:
    """Seconds that importing a module adds to `import torch`, in a fresh process, its bytecode as pip leaves it."""
    script = f"import torch, time; t = time.perf_counter(); import {module}; print((time.perf_counter() - t) * 1e3)"
    command = [sys.executable, "-c", script]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2)]
    return float(done[1].stdout)


RELEASE = """
import json, os, sys, time
import weightload
from harness.proc import MEMORY_FIELDS, process_memory

def held():
    return process_memory(os.getpid(), MEMORY_FIELDS)

begin = held()
weights = weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, backend="pread", show_progress=False)
tensors = dict(weights)
loaded = held()
del tensors
kept = held()
start = time.perf_counter()
weightload.release_memory()
took = (time.perf_counter() - start) * 1e3
print(json.dumps({"begin": begin, "loaded": loaded, "kept": kept, "released": held(), "milliseconds": took}))
"""


def releasing(path: Path) -> dict[str, float]:
    """Bytes that a process holds as it loads a file, lets go of it, and gives the memory back; and what that takes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", RELEASE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def write_file(path: Path, header: dict[str, Any], parts: Iterable[bytes]) -> None:
    """A safetensors file; the parts are its tensors' bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(parts)


def write_giga(path: Path) -> None:
    """16 tensors of 64 MB."""
    size = 64 * 10**6
    header = {f"{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(16)}
    write_file(path, header, (os.urandom(size) for _ in header))


def write_header(path: Path, tensors: int) -> None:
    """A file of tensors of 16 bytes with names as long as those of a mixture of experts."""
    header = {
        f"model.layers.{i // 384}.mlp.experts.{i % 384 // 3}.{('gate', 'up', 'down')[i % 3]}_proj.weight.{i}": {
            "dtype": "BF16",
            "shape": [2, 4],
            "data_offsets": [16 * i, 16 * i + 16],
        }
        for i in range(tensors)
    }
    write_file(path, header, [bytes(range(256)) * (tensors // 16)])


def median_ms(call: Callable[[], object], repeats: int = 9) -> float:
    """Median duration, in milliseconds, after one call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def drain_reference(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (the handle is no dict)
            file.get_tensor(name)


def drain_ours(path: Path) -> None:
    for _ in weightload.safetensors_weights_iterator([path], to_cpu=True, show_progress=False):
        pass


def open_reference(path: Path) -> None:
    with safe_open(path, framework="pt"):
        pass


def open_and_get_all(opener: Callable[..., Any], path: Path, backend: str) -> None:
    with opener(path, framework="pt", backend=backend) as file:
        kept = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert kept


def alternating_ms(calls: dict[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Medians, in milliseconds, of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:  # the first is not counted
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(several) for name, several in times.items()}


def handles(small: Path, single: Path) -> list[dict[str, Any]]:
    """Ours against safetensors', a row for each thing that a handle does."""
    openers = {"weightload": weightload.safe_open, "safetensors": safe_open}
    rows = []
    for what, path, backend, work in (
        ("open 16 tensors", single, "mmap", lambda opener, path, _: opener(path, framework="pt")),
        ("open 20,000 tensors", small, "mmap", lambda opener, path, _: opener(path, framework="pt")),
        ("open and get 20,000 tensors", small, "mmap", open_and_get_all),
        ("open and get 20,000 tensors", small, "pread", open_and_get_all),
    ):
        took = alternating_ms(
            {name: lambda o=opener, w=work, p=path, b=backend: w(o, p, b) for name, opener in openers.items()}  # type: ignore[misc]
        )
        rows.append({"what": what, "backend": backend, **took, "ratio": took["safetensors"] / took["weightload"]})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args()
    rows: dict[str, Any] = {"import": statistics.median(import_milliseconds("weightload") for _ in range(5))}
    with tempfile.TemporaryDirectory() as folder:
        many, small = Path(folder, "many.safetensors"), Path(folder, "small.safetensors")
        write_header(many, 100_000)
        write_header(small, 20_000)
        rows["open_100k"] = median_ms(lambda: open_files([many]))
        rows["open_100k_safetensors"] = median_ms(lambda: open_reference(many))
        for name, drain, opener in (
            ("tensor_us", drain_ours, lambda: open_files([small])),
            ("tensor_us_safetensors", drain_reference, lambda: open_reference(small)),
        ):
            rows[name] = (median_ms(lambda drain=drain: drain(small)) - median_ms(opener)) / 20  # type: ignore[misc]
        single = Path(folder, "single.safetensors")
        write_header(single, 16)
        rows["handles"] = handles(small, single)
        write_giga(giga := Path(folder, "giga.safetensors"))
        rows["release_memory"] = releasing(giga)
    print(f"import weightload, over import torch   {rows['import']:8.1f} ms")
    print(f"header of 100,000 tensors              {rows['open_100k']:8.1f} ms", end="")
    print(f"   (safetensors {rows['open_100k_safetensors']:.1f} ms)")
    print(f"a tensor                               {rows['tensor_us']:8.2f} us", end="")
    print(f"   (safetensors {rows['tensor_us_safetensors']:.2f} us)")
    memory = {name: bytes_ / 1e9 for name, bytes_ in rows["release_memory"].items()}
    print(
        f"release_memory()                       {rows['release_memory']['milliseconds']:8.1f} ms   (anonymous memory: "
        f"{memory['begin']:.2f} GB, with a load's {memory['loaded']:.2f}, its tensors gone {memory['kept']:.2f}, "
        f"given back {memory['released']:.2f})"
    )
    for row in rows["handles"]:
        what = f"safe_open, {row['backend']}: {row['what']}"
        print(f"{what:50} {row['weightload']:8.3f} ms   (safetensors {row['safetensors']:.3f} ms, {row['ratio']:.1f}x)")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"benchmark": "fixed_costs", **describe([]), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
