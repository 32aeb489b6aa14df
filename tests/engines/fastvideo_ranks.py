"""One rank of FastVideo on the CPU, for test_fastvideo.py: loads by FastVideo's iterator, then by weightload's.

Arguments: rank, ranks, port, the files as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
from engine_support import same_weights
from fastvideo.distributed import parallel_state

import weightload
from weightload.integrations import fastvideo

calls: list[dict[str, Any]] = []
original = weightload.safetensors_weights_iterator


def counted(files: Any, **named: Any) -> Any:
    """weightload's iterator, its calls written down."""
    shared = named.pop("group", None)
    calls.append({"files": len(files), "ranks": 0 if shared is None else shared.size(), **named})
    calls[-1]["device"] = str(named["device"])
    return original(files, group=shared, **named)


weightload.safetensors_weights_iterator = counted  # type: ignore[assignment]


# FastVideo knows no loads to the CPU's ranks: where there is no GPU it names Apple's.
parallel_state.get_local_torch_device = lambda: torch.device("cpu")
rank, ranks, port = map(int, sys.argv[1:4])
files = json.loads(sys.argv[4])
if ranks > 1:
    parallel_state.init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank)
ways: list[dict[str, bool]] = [{}, {"to_cpu": True}, {"broadcast": False}, {"async_broadcast": True}]
modules = [importlib.import_module(name) for name, _ in fastvideo.SITES]
own = [dict(modules[0].safetensors_weights_iterator(files, **way)) for way in ways]
before = len(calls)
weightload.install("fastvideo")
same = []
for module in modules:
    for way, wanted in zip(ways, own, strict=True):
        same.append(same_weights(dict(module.safetensors_weights_iterator(files, **way)), wanted))
error = ""
if len(sys.argv) > 5:
    try:
        list(modules[0].safetensors_weights_iterator([sys.argv[5]]))
    except weightload.HeaderError as failed:
        error = f"{type(failed).__name__}: {failed}"
sys.stdout.write("\n" + json.dumps({"before": before, "calls": calls, "same": same, "error": error}) + "\n")
