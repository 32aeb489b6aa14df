"""Measures loads of one rank's shards: DTensors that exist, filled from a checkpoint of whole tensors.

    python benchmarks/sharded_loads.py --model-path MODEL [--plans fsdp4 tp2 ...] [--rounds 5] [--json FILE]

Plans, of a rank in the middle: `fsdp2` and `fsdp4` (rows of everything), `tp2` and `tp4` (rows of the projections that
tensor parallelism splits by their output, columns of `o_proj` and `down_proj`), `hsdp2x2` (replicas of two shards),
`ep4` (a fourth of the experts, whole, where the model has any). Ways: `load_into`; torch's DCP with its reader of
safetensors; `get_slice` of safetensors, copied, as transformers does it; all of a file, and a copy of the shard.

Each load is the first of a fresh process that is one rank of a group whose others are not there, in shuffled turns,
warm (page cache) or cold. Every way's shards are compared with the whole tensors in its first process. What is read
(`/proc/self/io`, `rchar`; of mapped files nothing counts there) is told beside what the shards have.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from first_loads import against
from machine import describe, evict, fill_cache
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import weightload

MESHES = {"fsdp2": (2,), "fsdp4": (4,), "tp2": (2,), "tp4": (4,), "hsdp2x2": (2, 2), "ep4": (4,)}
PLANS = ["fsdp2", "fsdp4", "tp2", "tp4", "hsdp2x2"]  # of any model
BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
OURS = "weightload"
Target = dict[str, torch.Tensor]


def placements(plan: str, name: str, shape: Iterable[int]) -> list[Any] | None:
    """Of a tensor on the plan's mesh; None: it is not this rank's."""
    dimensions = len(list(shape))
    if plan.startswith("fsdp"):
        return [Shard(0) if dimensions else Replicate()]
    if plan.startswith("hsdp"):
        return [Replicate(), Shard(0) if dimensions else Replicate()]
    if plan == "ep4":
        parts = name.split(".")
        number = int(parts[parts.index("experts") + 1]) if "experts" in parts else 1
        return [Replicate()] if number % 4 == 1 else None
    if dimensions < 2:
        return [Replicate()]
    return [Shard(1 if name.endswith(BY_COLUMNS) else 0)]


def target_of(plan: str, files: list[str]) -> Target:
    """This rank's empty shards, their memory touched."""
    mesh = init_device_mesh("cpu", MESHES[plan])
    found: Target = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                chosen = placements(plan, name, part.get_shape())
                if chosen is None:
                    continue
                whole = torch.empty(part.get_shape(), dtype=part[:0].dtype, device="meta")
                local = torch.zeros(whole[ranges_of(whole.shape, mesh, chosen)].shape, dtype=whole.dtype)
                found[name] = DTensor.from_local(
                    local, mesh, chosen, run_check=False, shape=whole.shape, stride=whole.stride()
                )
    return found


def ranges_of(shape: torch.Size, mesh: DeviceMesh, chosen: Sequence[Any]) -> tuple[slice, ...]:
    """The indices of a shard, of placements as above."""
    found = [slice(None)] * len(shape)
    for size, number, placement in zip(mesh.shape, mesh.get_coordinate() or (), chosen, strict=True):
        if isinstance(placement, Shard):
            each = -(-shape[placement.dim] // size)
            found[placement.dim] = slice(number * each, (number + 1) * each)
    return tuple(found)


def of_shard(shard: DTensor) -> tuple[slice, ...]:
    return ranges_of(shard.shape, shard.device_mesh, shard.placements)


def load_into(target: Target, files: list[str]) -> None:
    weightload.load_into(target, files, strict=False)


def dcp(target: Target, files: list[str]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(Path(files[0]).parent), thread_count=2)
    load(target, storage_reader=reader, no_dist=True)


def get_slice(target: Target, files: list[str]) -> None:
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.offset_keys():
                if name in target:
                    shard: Any = target[name]
                    part = handle.get_slice(name)
                    shard.to_local().copy_(part[of_shard(shard)] if shard.dim() else handle.get_tensor(name))


def whole_tensors(target: Target, files: list[str]) -> None:
    from safetensors.torch import load_file

    for file in files:
        for name, tensor in load_file(file).items():
            if name in target:
                shard: Any = target[name]
                shard.to_local().copy_(tensor[of_shard(shard)])


WAYS: dict[str, Callable[[Target, list[str]], None]] = {
    OURS: load_into,
    "DCP": dcp,
    "get_slice": get_slice,
    "whole tensors": whole_tensors,
}


def one_load(way: str, plan: str, cold: bool, check: bool, files: list[str]) -> dict[str, Any]:
    """In a process of its own."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=math.prod(MESHES[plan]))
    target = target_of(plan, files)
    wanted = sum(tensor.to_local().nbytes for tensor in target.values())  # type: ignore[attr-defined]
    if cold:
        evict(files)
    else:
        fill_cache(files)
    with torch.no_grad():
        before, begin = read_so_far(), time.perf_counter()
        WAYS[way](target, files)
        took = time.perf_counter() - begin
    result = {"seconds": took, "wanted": wanted, "read": read_so_far() - before, "tensors": len(target)}
    if check:
        for file in files:
            with safe_open(file, "pt") as handle:
                for name in set(handle.offset_keys()) & target.keys():
                    shard: Any = target[name]
                    whole = handle.get_tensor(name)
                    expected = whole[of_shard(shard)] if shard.dim() else whole
                    assert torch.equal(raw(shard.to_local()), raw(expected.contiguous())), (way, name)
    return result


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def read_so_far() -> int:
    """Bytes that this process has got from read calls."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def run(way: str, plan: str, cold: bool, check: bool, files: list[str]) -> dict[str, Any]:
    flags = [*(["--cold"] if cold else []), *(["--check"] if check else [])]
    command = [sys.executable, __file__, "--one", way, plan, *flags, "--model-path", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{way}, {plan}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(plan: str, cold: bool, ways: list[str], rounds: int, files: list[str]) -> dict[str, Any]:
    loads: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in random.sample(ways, len(ways)):
            loads[way].append(run(way, plan, cold, number == 0, files))
    ours = [load["seconds"] for load in loads[OURS]]
    print(f"{plan}, {'cold' if cold else 'warm'}: {loads[OURS][0]['wanted'] / 1e6:.0f} MB of shards", flush=True)
    for way, found in loads.items():
        seconds = [load["seconds"] for load in found]
        times = "" if way == OURS else f"{against(seconds, ours)} times"
        print(
            f"  {way:14} {statistics.median(seconds):7.3f} s  read {found[0]['read'] / 1e6:7.0f} MB  {times}",
            flush=True,
        )
    return {"plan": plan, "cold": cold, "loads": loads}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, nargs="+")
    parser.add_argument(
        "--plans", nargs="+", choices=sorted(MESHES), default=["fsdp2", "fsdp4", "tp2", "tp4", "hsdp2x2"]
    )
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--states", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, plan = options.one
        print(json.dumps(one_load(way, plan, options.cold, options.check, options.model_path)))
        return
    files = [file for path in options.model_path for file in weightload.resolve_safetensors_files(path)]
    ways = list(dict.fromkeys([OURS, *options.ways]))
    rows = [
        measure(plan, state == "cold", ways, options.rounds, files)
        for plan in options.plans
        for state in options.states
    ]
    if options.json:
        found = {**describe(files), "benchmark": "sharded loads", "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
