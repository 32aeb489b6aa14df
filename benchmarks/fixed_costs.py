"""Measures what a load costs before its first byte: import, header, and the making of a tensor.

    python benchmarks/fixed_costs.py [--json FILE]

The tensor's cost is that of a drained iterator over 20,000 small tensors, with the time to open the file taken off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe
from safetensors import safe_open

import weightload
from weightload.selection import open_files


def import_milliseconds(module: str) -> float:
    """What importing a module adds to `import torch`, in a fresh process."""
    script = f"import torch, time; t = time.perf_counter(); import {module}; print((time.perf_counter() - t) * 1e3)"
    command = [sys.executable, "-c", script]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


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
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(256)) * (tensors // 16))


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
    print(f"import weightload, over import torch   {rows['import']:8.1f} ms")
    print(f"header of 100,000 tensors              {rows['open_100k']:8.1f} ms", end="")
    print(f"   (safetensors {rows['open_100k_safetensors']:.1f} ms)")
    print(f"a tensor                               {rows['tensor_us']:8.2f} us", end="")
    print(f"   (safetensors {rows['tensor_us_safetensors']:.2f} us)")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"benchmark": "fixed_costs", **describe([]), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
