"""One rank of vLLM on the CPU, for test_vllm.py: loads a model in vLLM's way, then by weightload.

Arguments: rank, ranks, port, folder of the model, extra config as JSON, options of ``EngineArgs`` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

# The wheel is CUDA's. Its CPU platform is chosen by the version of the wheel, so it has to be told; and where torch has
# no accelerator its caches cannot be emptied.
vllm.platforms._current_platform = CpuPlatform()
torch.accelerator.empty_cache = lambda: None
# The wheel's extensions need CUDA's torch. After a load, a kernel would lay experts out in another order.
vllm._custom_ops.cpu_prepack_moe_weight = lambda weight, isa: weight

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader import base_loader, get_model  # noqa: E402

import weightload  # noqa: E402
from weightload import settings  # noqa: E402
from weightload.integrations import vllm as plugin  # noqa: E402

calls: list[dict[str, Any]] = []


def counted(*arguments: Any, **named: Any) -> Any:
    """weightload's iterator, written down: the call, the settings, and the names that were yielded."""
    call = {key: named[key] for key in ("device", "strategy", "backend")}
    call |= {"shared": named["group"] is not None, "threads": settings.current().threads, "names": []}
    calls.append(call)

    def weights() -> Any:
        for name, tensor in original(*arguments, **named):
            call["names"].append(name)
            yield name, tensor

    return weights()


original, weightload.safetensors_weights_iterator = weightload.safetensors_weights_iterator, counted
in_parts: list[InParts] = []


def counted_parts(*arguments: Any) -> InParts:
    """A load in parts, written down."""
    in_parts.append(InParts(*arguments))
    return in_parts[-1]


InParts, plugin.InParts = plugin.InParts, counted_parts


def parameters(folder: str, load_format: str, extra: dict[str, Any], options: dict[str, Any]) -> Any:
    """The parameters of a model that vLLM makes and loads."""
    arguments = EngineArgs(
        model=folder, load_format=load_format, model_loader_extra_config=extra, tensor_parallel_size=ranks,
        skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64, **options,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            initialize_model_parallel(ranks, 1)
        else:  # layers are registered by name, once in a configuration
            config.compilation_config.static_forward_context.clear()
        model = get_model(vllm_config=config)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


rank, ranks, port = map(int, sys.argv[1:4])
folder, extra, options = sys.argv[4], json.loads(sys.argv[5]), json.loads(sys.argv[6])
if "quantization_config" in json.loads(Path(folder, "config.json").read_text()):
    # Kernels of the wheel lay the weights out in another way. Before that they are compared.
    base_loader.process_weights_after_loading = lambda *arguments: None
# Set what a launcher would set, which vLLM is not: the loads have to go by vLLM's ranks.
os.environ["LOCAL_RANK"] = str(rank)
own = parameters(folder, "safetensors", {}, options)
before = len(calls)
ours = parameters(folder, "weightload", extra, options)
same = [
    name for name in own if own[name].dtype == ours[name].dtype
    and torch.equal(own[name].view(torch.uint8), ours[name].view(torch.uint8))
]  # fmt: skip
said = {
    "before": before, "calls": calls, "parameters": len(own), "same": len(same),
    "parts": [dataclasses.asdict(load.counts) for load in in_parts],
}  # fmt: skip
sys.stdout.write("\n" + json.dumps(said) + "\n")
