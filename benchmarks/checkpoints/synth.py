"""Writes synthetic checkpoints: tensor names, shapes and dtypes of a real model, random bytes, sharded with an index.

    python benchmarks/checkpoints/synth.py OUT --model llama-3-8b --layers 4

Random bytes, never zeros: zeros can be compressed or left out by file systems and virtual disks, and then measure
nothing. The size is scaled by the number of layers; every tensor keeps its real shape. Shards are written side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from checkpoints.architectures import ARCHITECTURES, Architecture, Entry

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
PIECE = 16 << 20


def entry_bytes(entry: Entry) -> int:
    """Bytes of a tensor."""
    return math.prod(entry[2]) * DTYPE_BYTES[entry[1]]


def layers_for(architecture: Architecture, gigabytes: float) -> int:
    """The least number of layers that makes the checkpoint at least this large (10^9 bytes), or all."""
    for layers in range(1, architecture.layers):
        if sum(map(entry_bytes, architecture.entries(layers))) >= gigabytes * 1e9:
            return layers
    return architecture.layers


def write_checkpoint(folder: Path, architecture: Architecture, layers: int, shards: int, seed: int = 0) -> int:
    """Write the shards and, for more than one, their index; returns the bytes of all tensors.

    A checkpoint of the same shape that is already there is left as it is.
    """
    entries = architecture.entries(layers)
    total = sum(map(entry_bytes, entries))
    recipe = json.dumps({"entries": len(entries), "bytes": total, "shards": shards, "seed": seed})
    done = folder / "synth.json"
    if done.exists() and done.read_text() == recipe:
        return total
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    parts = _split(entries, shards)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        writing = []
        for number, part in enumerate(parts, 1):
            name = f"{architecture.file_stem}-{number:05d}-of-{len(parts):05d}.safetensors"
            if len(parts) == 1:
                name = f"{architecture.file_stem}.safetensors"
            writing.append(pool.submit(_write_file, folder / name, part, np.random.SFC64([seed, number])))
            weight_map.update({entry[0]: name for entry in part})
        for file in writing:
            file.result()
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{architecture.file_stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    done.write_text(recipe)
    return total


def _split(entries: list[Entry], shards: int) -> list[list[Entry]]:
    """Cut the entries, in order, into at most this many parts of about equal bytes."""
    parts: list[list[Entry]] = [[] for _ in range(shards)]
    total = max(1, sum(map(entry_bytes, entries)))
    begin = 0
    for entry in entries:
        middle = begin + entry_bytes(entry) // 2
        parts[min(shards - 1, middle * shards // total)].append(entry)
        begin += entry_bytes(entry)
    return [part for part in parts if part]


def _write_file(path: Path, entries: list[Entry], random: np.random.SFC64) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + entry_bytes((name, dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset > 0:
            piece = min(PIECE, offset)
            # Raw words, twenty times as fast as Generator.bytes; neither they nor the writing hold the GIL.
            file.write(random.random_raw(-(-piece // 8)).data.cast("B")[:piece])
            offset -= piece


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="llama-3-8b")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, help="layers to write (default: all of the real model)")
    size.add_argument("--gigabytes", type=float, help="write as many layers as make at least this size")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    architecture = ARCHITECTURES[options.model]
    layers = options.layers or architecture.layers
    if options.gigabytes:
        layers = layers_for(architecture, options.gigabytes)
    total = write_checkpoint(options.out, architecture, layers, options.shards, options.seed)
    print(f"{options.out}: {len(architecture.entries(layers))} tensors, {layers} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
