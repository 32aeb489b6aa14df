"""Measures loads of shards by real ranks: DTensors that exist, filled from a checkpoint of whole tensors.

    python benchmarks/sharded_loads.py --model-path MODEL [--plans fsdp4 tp2 ...] [--rounds 5] [--device cuda:0]
        [--json FILE]

Plans: `fsdp2`, `fsdp4` and `fsdp8` (rows of everything), `tp2` and `tp4` (rows of the projections that tensor
parallelism splits by their output, columns of `o_proj` and `down_proj`), `hsdp2x2` (replicas of two shards), `ep4`
(each rank's experts, whole, where the model has any). For `--plans fsdp2` of 5,000 small tensors,
`checkpoints/synth.py OUT --model small-tensors --layers 5` writes them.

Ways: `weightload` (load_into); `DCP` with its reader of safetensors; `get_slice` of safetensors, copied, as
transformers does it; `whole tensors` (every rank iterates all tensors and copies its shard); `distribute_tensor` (the
same with `distribute_tensor(..., src_data_rank=None)`, as FastVideo); `rank 0, broadcast` (rank 0 loads the files, then
torch's `set_model_state_dict(..., full_state_dict=True, broadcast_from_rank0=True)`). The limit is `raw parallel read`:
rank 0 alone reads all bytes once.

The ranks of a plan are processes over gloo that live for all its loads. The ways take turns, in another order each
round, each from the same state: warm, or evicted and verified so. A load takes as long as its slowest rank. Before the
rounds each way loads once untimed, and every rank's shards are compared with the whole tensors.

With `--fresh` the ranks start anew for each load, which is the first of their processes, into parameters whose memory
nobody has touched: as a job starts. Memory is as it comes, or touched by another process a moment before (`--memories`,
see first_loads.py). The shards of the first round are compared, after the load.

With `--device` the shards are in the memory of that one accelerator, which all ranks share, and the mesh is its own:
over NCCL 2.30 or later, which is preloaded as in gpu/ranks.py. A load has ended when the device is idle.

Bytes are told of all
ranks together: those that shards have; what came out of read calls (`rchar` of `/proc/self/io`: mapped files do not
count there, gloo's sockets may); and, cold, what storage brought in for these processes (`read_bytes`, with what the
system read ahead).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from first_loads import MEMORIES, against
from gpu.limits import environment
from gpu.ranks import KIT_NCCL, prepared
from harness.machine import back_memory_elsewhere, describe, evict, fill_cache, raw_parallel_read, resident_share
from harness.ranks import GroupedRanks
from loaders.into_loads import add_parameter
from loaders.worker import a_device
from report.figures import duration, megabytes
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_by_dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import weightload
from weightload._base.cpus import usable_cpus

MESHES = {"fsdp2": (2,), "fsdp4": (4,), "fsdp8": (8,), "tp2": (2,), "tp4": (4,), "hsdp2x2": (2, 2), "ep4": (4,)}
PLANS = ["fsdp2", "fsdp4", "tp2", "tp4", "hsdp2x2"]  # of any model
BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
STATES = ("warm", "cold")
OURS, RAW = "weightload", "raw parallel read"
SHARED = "rank 0, broadcast"
LIMIT_S = 3 * 3600  # of one plan
Target = dict[str, torch.Tensor]


def is_expert(name: str) -> bool:
    return "experts" in name.split(".")


def placements(plan: str, name: str, shape: Iterable[int], rank: int) -> list[Any] | None:
    """A tensor's placements on the plan's mesh; None: another rank's. A rank's experts are its alone: plain tensors."""
    dimensions = len(list(shape))
    if plan.startswith("fsdp"):
        return [Shard(0) if dimensions else Replicate()]
    if plan.startswith("hsdp"):
        return [Replicate(), Shard(0) if dimensions else Replicate()]
    if plan == "ep4":
        parts = name.split(".")
        mine = not is_expert(name) or int(parts[parts.index("experts") + 1]) % 4 == rank
        return [Replicate()] if mine else None
    if dimensions < 2:
        return [Replicate()]
    return [Shard(1 if name.endswith(BY_COLUMNS) else 0)]


def target_of(plan: str, files: list[str], device: torch.device) -> Target:
    """This rank's shards, whose memory nobody has touched."""
    mesh = init_device_mesh(device.type, MESHES[plan])
    found: Target = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                chosen = placements(plan, name, part.get_shape(), dist.get_rank())
                if chosen is None:
                    continue
                dtype = part[:0].dtype if part.get_shape() else handle.get_tensor(name).dtype
                whole = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                local = torch.empty(whole[ranges_of(whole.shape, mesh, chosen)].shape, dtype=dtype, device=device)
                found[name] = local
                if not (plan == "ep4" and is_expert(name)):
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


def of_shard(shard: torch.Tensor) -> tuple[slice, ...]:
    if not isinstance(shard, DTensor):
        return (slice(None),) * shard.dim()
    return ranges_of(shard.shape, shard.device_mesh, shard.placements)


def local(target: Target, name: str) -> torch.Tensor:
    """The memory of a shard on this rank."""
    shard: Any = target[name]
    found: torch.Tensor = shard.to_local() if isinstance(shard, DTensor) else shard
    return found


def load_into(target: Target, files: list[str]) -> None:
    weightload.load_into(target, files, strict=False)


def dcp(target: Target, files: list[str]) -> None:
    load_by_dcp(target, storage_reader=HuggingFaceStorageReader(str(Path(files[0]).parent), thread_count=2))


def get_slice(target: Target, files: list[str]) -> None:
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.offset_keys():
                if name in target:
                    shard: Any = target[name]
                    part = handle.get_slice(name)
                    local(target, name).copy_(part[of_shard(shard)] if shard.dim() else handle.get_tensor(name))


def iterate(files: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """All tensors, one after the other, as FastVideo's iterator reads them to the CPU."""
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.offset_keys():
                yield name, handle.get_tensor(name)


def whole_tensors(target: Target, files: list[str]) -> None:
    for name, tensor in iterate(files):
        if name in target:
            local(target, name).copy_(tensor[of_shard(target[name])])


def distribute(target: Target, files: list[str]) -> None:
    for name, tensor in iterate(files):
        if name in target:
            shard: Any = target[name]
            if isinstance(shard, DTensor):
                tensor = distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None).to_local()
            local(target, name).copy_(tensor)


def rank0_broadcast(target: Target, files: list[str]) -> None:
    model = torch.nn.Module()
    for name, shard in target.items():
        add_parameter(model, name, shard)
    state: dict[str, Any] = {}
    if dist.get_rank() == 0:
        for file in files:
            state |= load_file(file)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def raw(target: Target, files: list[str]) -> None:
    if dist.get_rank() == 0:
        raw_parallel_read(files, usable_cpus())


WAYS: dict[str, Callable[[Target, list[str]], None]] = {
    OURS: load_into,
    "DCP": dcp,
    "get_slice": get_slice,
    "whole tensors": whole_tensors,
    "distribute_tensor": distribute,
    SHARED: rank0_broadcast,
}


def prepare(ranks: GroupedRanks, cold: bool, touched: bool, files: list[str]) -> None:
    """Make the state the same before every load: memory backed or as it comes, files in the page cache or out of it."""
    gc.collect()
    ranks.barrier()
    if ranks.first:
        if touched:
            back_memory_elsewhere(2 * sum(Path(file).stat().st_size for file in files))
        if cold:
            evict(files)
        elif resident_share(files) < 1:
            fill_cache(files)
    ranks.barrier()


def one_load(way: str, ranks: GroupedRanks, target: Target, files: list[str]) -> dict[str, Any]:
    """Seconds of the slowest rank, and bytes of all of them."""
    with torch.no_grad():
        before, begin = bytes_so_far(), time.perf_counter()
        (raw if way == RAW else WAYS[way])(target, files)
        synchronize(target)
        took = time.perf_counter() - begin
    counted = [now - then for now, then in zip(bytes_so_far(), before, strict=True)]
    wanted = sum(local(target, name).nbytes for name in target)
    wanted, read, stored = (sum(values) for values in zip(*ranks.gather([wanted, *counted]), strict=True))
    return {"seconds": ranks.slowest(took), "wanted": wanted, "read": read, "from_storage": stored}


def synchronize(target: Target) -> None:
    """Until the shards' device has done what was queued."""
    device = local(target, next(iter(target))).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bytes_so_far() -> tuple[int, int]:
    """Bytes that this process has got from read calls, and bytes that storage has brought in for it."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["read_bytes"])


def check(way: str, target: Target, files: list[str]) -> None:
    """Compare each shard with what safetensors reads."""
    for name, whole in iterate(files):
        if name in target:
            expected = whole[of_shard(target[name])] if whole.dim() else whole
            if not torch.equal(as_bytes(local(target, name).cpu()), as_bytes(expected.contiguous())):
                raise SystemExit(f"{way} does not give the bytes of the files: {name}, rank {dist.get_rank()}")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def measure(
    plan: str, state: str, ways: list[str], rounds: int, ranks: GroupedRanks, target: Target, files: list[str]
) -> dict[str, Any]:
    """All ways in turns; what is written of one state of a plan."""
    loads: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in random.Random(number).sample(ways, len(ways)):  # the same on all ranks
            for name in target:
                local(target, name).zero_()
            synchronize(target)
            prepare(ranks, state == "cold", local(target, next(iter(target))).device.type == "cpu", files)
            load = one_load(way, ranks, target, files)
            if number > 0:
                loads[way].append(load)
            elif way != RAW:
                check(way, target, files)
    row = {"plan": plan, "cold": state == "cold", "ranks": ranks.count, "tensors": len(target)}
    return row | {"limits": {RAW: loads.pop(RAW)}, "loads": loads}


def measure_fresh(plan: str, state: str, memory: str, options: argparse.Namespace, files: list[str]) -> dict[str, Any]:
    """All ways in turns, by ranks that start for each load."""
    ways = [*ways_of(plan, options), RAW]
    loads: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    found: dict[str, Any] = {}
    for number in range(options.rounds):
        for way in random.sample(ways, len(ways)):
            fresh = ["--fresh", "--ways", way, "--states", state, "--memories", memory]
            found = start(plan, [*fresh, *(["--check"] if number == 0 else [])], options, files)
            loads[way].append(found.pop("load"))
    return found | {"memory": memory, "limits": {RAW: loads.pop(RAW)}, "loads": loads}


def first_load(plan: str, options: argparse.Namespace, ranks: GroupedRanks, files: list[str]) -> dict[str, Any]:
    """One load, the first of these processes."""
    target = target_of(plan, files, options.device)
    (way,), cold = options.ways, options.states == ["cold"]
    prepare(ranks, cold, options.memories != ["as it comes"], files)
    load = one_load(way, ranks, target, files)
    if options.check and way != RAW:
        check(way, target, files)
    return {"plan": plan, "cold": cold, "ranks": ranks.count, "tensors": len(target), "load": load}


def ways_of(plan: str, options: argparse.Namespace) -> list[str]:
    """Choose the ways for a plan. Where ranks have different names, no rank's state can be sent to all."""
    ways = list(dict.fromkeys([OURS, *options.ways]))
    return [way for way in ways if not (plan == "ep4" and way == SHARED)]


def print_row(row: dict[str, Any]) -> None:
    """A table for people."""
    ours = [load["seconds"] for load in row["loads"][OURS]]
    wanted = row["loads"][OURS][0]["wanted"] / 1e6
    state = f"{'cold' if row['cold'] else 'warm'}{', first load, memory ' + row['memory'] if 'memory' in row else ''}"
    print(f"{row['plan']}, {state}: {wanted:.0f} MB of shards, {row['ranks']} ranks")
    for way, found in (row["loads"] | row["limits"]).items():
        seconds = [load["seconds"] for load in found]
        times = "" if way in (OURS, RAW) else f"{against(seconds, ours)} times"
        read = f"read {megabytes(found[-1]['read'])} {megabytes(found[-1]['from_storage'] if row['cold'] else None)}"
        print(f"  {way:18} {duration(statistics.median(seconds))}  {read}  {times}".rstrip())
    sys.stdout.flush()


def work(plan: str, out: Path, options: argparse.Namespace) -> None:
    """One rank of a plan."""
    files = options.model_path
    torch.set_num_threads(1)
    ranks = GroupedRanks(options.device, whole=True)
    if options.device.type != "cpu":
        os.environ["LOCAL_RANK"] = str(options.device.index)  # by which init_device_mesh chooses a device
    found: Any
    if options.fresh:
        found = first_load(plan, options, ranks, files)
    else:
        target, ways = target_of(plan, files, options.device), [*ways_of(plan, options), RAW]
        found = [measure(plan, state, ways, options.rounds, ranks, target, files) for state in options.states]
    if ranks.first:
        out.write_text(json.dumps(found))
    ranks.close()


def start(plan: str, flags: list[str], options: argparse.Namespace, files: list[str]) -> Any:
    """Start the ranks of a plan; what the first of them found."""
    with tempfile.TemporaryDirectory(prefix="sharded-loads-") as folder:
        out, environ = Path(folder) / "found.json", dict(os.environ)
        flags = [*flags, "--device", str(options.device)]
        if options.device.type == "cuda":
            environ, _, refusal = prepared(KIT_NCCL, Path(folder))
            if refusal:
                sys.exit(refusal)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(math.prod(MESHES[plan]))]
        command = [sys.executable, *launch, __file__, "--work", plan, str(out), *flags, "--model-path", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=environ)
        if done.returncode:
            sys.exit(f"{plan}: {done.stderr[-3000:]}")
        return json.loads(out.read_text())


def rows_of(plan: str, options: argparse.Namespace, files: list[str]) -> Iterable[dict[str, Any]]:
    if options.fresh:
        for memory in options.memories:
            for state in options.states:
                yield measure_fresh(plan, state, memory, options, files)
        return
    flags = ["--rounds", str(options.rounds), "--ways", *ways_of(plan, options), "--states", *options.states]
    yield from start(plan, flags, options, files)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, nargs="+")
    parser.add_argument("--plans", nargs="+", choices=sorted(MESHES), default=PLANS)
    parser.add_argument("--ways", nargs="+", choices=sorted([*WAYS, RAW]), default=list(WAYS))
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--fresh", action="store_true", help="the ranks start anew for each load")
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES), help="with --fresh")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=a_device, default="cpu", help="that all ranks share")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        plan, out = options.work
        work(plan, Path(out), options)
        return
    files = [file for path in options.model_path for file in weightload.resolve_safetensors_files(path)]
    rows = []
    for plan in options.plans:
        for row in rows_of(plan, options, files):
            rows.append(row)
            print_row(row)
    if options.json:
        size = sum(Path(file).stat().st_size for file in files)
        found = describe(files) if options.device.type == "cpu" else environment(options.device, files)
        found |= {"benchmark": "sharded loads", "bytes": size, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
