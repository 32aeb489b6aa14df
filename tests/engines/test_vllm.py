"""vLLM with ``--load-format weightload``: whole models on the CPU; one rank, two, two with expert parallelism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import needs, run_ranks, write_shards
from safetensors.torch import load_file

from weightload.integrations.in_parts import LEAST_BYTES

pytestmark = needs("vllm")

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip
# With these sizes, tensors are large enough to be read in parts.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "vocab_size": 1024}
# Weights of 8 bits with a scale for each row, which vLLM cannot run on the CPU without kernels of its wheel, but loads.
INT8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
    }},
}  # fmt: skip


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model of random weights in three files."""
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (words, hidden),
        "lm_head.weight": (words, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (narrow, hidden) for name in "kv"}
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if experts := config.get("num_local_experts"):
            shapes[f"{at}.block_sparse_moe.gate.weight"] = (experts, hidden)
            for expert in range(experts):
                of = f"{at}.block_sparse_moe.experts.{expert}"
                shapes |= {f"{of}.w1.weight": (inner, hidden), f"{of}.w3.weight": (inner, hidden)}
                shapes[f"{of}.w2.weight"] = (hidden, inner)
        else:
            shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "quantization_config" in config:
        for name in [name for name in tensors if "_proj." in name]:
            tensors[f"{name}_scale"] = tensors[name].abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensors[name] / tensors[f"{name}_scale"]).round().to(torch.int8)
    write_shards(folder, tensors, 3)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), LLAMA)


def load(folder: Path, ranks: int, extra: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    """Load by vLLM and by weightload, and return each rank's report. The parameters must be the same after both."""
    said = run_ranks("vllm_ranks.py", ranks, folder, json.dumps(extra or {}), json.dumps(options))
    for rank in said:
        assert rank["before"] == 0  # the format was not chosen yet
        assert rank["parameters"] == rank["same"] > 10
        assert len(rank["calls"]) + len(rank["parts"]) == 1
    return said


def test_a_model_on_one_rank(llama: Path) -> None:
    """The plugin is found by its entry point; one call reads all files, to the CPU, alone."""
    (rank,) = load(llama, 1)
    (call,) = rank["calls"]
    assert len(call.pop("names")) == 3 + 2 * 9
    assert call == {"device": "cpu", "strategy": "independent", "backend": "mmap", "shared": False, "threads": 0}


def test_tensor_parallel_ranks_that_share_the_reading(llama: Path) -> None:
    said = load(llama, 2, {"strategy": "striped", "threads": 2, "backend": "pread"})
    for rank in said:
        (call,) = rank["calls"]
        assert len(call.pop("names")) == 3 + 2 * 9
        assert call == {"device": "cpu", "strategy": "striped", "backend": "pread", "shared": True, "threads": 2}


@pytest.mark.parametrize("strategy", ["independent", "striped"])
def test_expert_parallel_ranks_read_their_own_experts(tmp_path: Path, strategy: str) -> None:
    """Also where they share the reading of all else."""
    model = write_model(tmp_path, MIXTRAL)
    options = {"enable_expert_parallel": True, "enable_ep_weight_filter": True}
    for number, rank in enumerate(load(model, 2, {"strategy": strategy}, **options)):
        names = rank["calls"][0]["names"]
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}
        assert experts == {2 * number, 2 * number + 1}
        assert sum(".experts." not in name for name in names) == 3 + 2 * 7


@pytest.mark.parametrize("model", ["llama", "int8", "mixtral", "mixtral_experts"])
def test_ranks_that_read_what_they_narrow_to(tmp_path: Path, model: str) -> None:
    """Half of each large tensor of the two ranks' layers, and all of what both have."""
    config = {**(MIXTRAL if model.startswith("mixtral") else LLAMA), **WIDE, "num_hidden_layers": 3}
    if model == "int8":
        config |= {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "quantization_config": INT8}
    options = {"enable_expert_parallel": True} if model == "mixtral_experts" else {}
    folder = write_model(tmp_path, config)
    for rank in load(folder, 2, {"parts": True, "backend": "pread", "threads": 2}, **options):
        (counts,) = rank["parts"]
        sizes = [tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
        large = sum(size for size in sizes if size >= LEAST_BYTES)
        assert counts["checkpoint"] == sum(sizes)
        assert counts["ahead"] + counts["asked"] == large // 2 + sum(sizes) - large
        assert counts["asked"] < counts["ahead"]
