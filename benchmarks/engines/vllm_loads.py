"""vLLM's load_weights on two ranks of the CPU: by its own loader, by weightload, and in parts, in turns.

.build/engines/bin/python benchmarks/engines/vllm_loads.py [--cold] [--rounds N] [--folder F]

Needs what ``make test-engines`` installs. The time is that of the slower rank, into parameters whose memory has been
touched; a model of 1.9 GB in three files is written to ``--folder`` if it is not there.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENGINES = Path(__file__).parents[2] / "tests" / "engines"
RANKS = 2
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "vLLM's own": ("safetensors", {}),
    "weightload": ("weightload", {}),
    "in parts": ("weightload", {"parts": True}),
    "pread": ("weightload", {"backend": "pread"}),
    "pread in parts": ("weightload", {"backend": "pread", "parts": True}),
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def write_model(folder: Path, files: int = 3) -> None:
    """In bfloat16, the layers in their order, as models are published."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, words = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    shapes: dict[str, tuple[Any, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(int(str(LLAMA["num_hidden_layers"]))):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    places, each = {}, -(-len(shapes) // files)
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        names = list(shapes)[number * each : (number + 1) * each]
        save_file({name: torch.randn(shapes[name]).bfloat16() for name in names}, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def evict(folder: Path) -> None:
    """The files' pages from the page cache, as far as nobody maps them."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    """Bytes that storage has given this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def be_rank(rank: int, port: int, folder: Path, rounds: int, cold: bool) -> list[dict[str, Any]]:
    """All loads of one rank."""
    sys.path.insert(0, str(ENGINES / "stand_ins"))
    import torch

    importlib.import_module("torchvision_operators")
    import vllm._custom_ops
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()  # the wheel is CUDA's
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    import weightload

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    done, model = [], None
    for _ in range(rounds):
        for name, (load_format, extra) in WAYS.items():
            config = EngineArgs(
                model=str(folder), load_format=load_format, model_loader_extra_config=extra, dtype="bfloat16",
                tensor_parallel_size=RANKS, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
            ).create_engine_config()  # fmt: skip
            with set_current_vllm_config(config):
                if model is None:
                    init_distributed_environment(RANKS, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
                    initialize_model_parallel(RANKS, 1)
                    torch.set_default_dtype(torch.bfloat16)
                    model = initialize_model(vllm_config=config, model_config=config.model_config)
                    for parameter in model.parameters():
                        parameter.data.zero_()
                loader = get_model_loader(config.load_config)
                gc.collect()
                weightload.release_memory()
                torch.distributed.barrier()
                if cold and rank == 0:
                    evict(folder)
                torch.distributed.barrier()
                before = time.perf_counter(), time.process_time(), disk_bytes()
                loader.load_weights(model, config.model_config)
                after = time.perf_counter(), time.process_time(), disk_bytes()
            torch.distributed.barrier()
            done.append({"way": name} | {
                what: end - begin for what, begin, end in zip(("s", "cpu_s", "disk"), before, after, strict=True)
            })  # fmt: skip
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold", action="store_true", help="evict the files before each load")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/weightload-vllm"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        print("\n" + json.dumps(be_rank(given.rank, given.port, given.folder, given.rounds, given.cold)))
        return
    if not given.folder.exists():
        write_model(given.folder)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], f"--rank={rank}", f"--port={port}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    for way in WAYS:
        loads = [pair for pair in zip(*said, strict=True) if pair[0]["way"] == way]
        seconds = [max(load["s"] for load in pair) for pair in loads]
        cpu, disk = (
            statistics.median(sum(load[what] for load in pair) for pair in loads) for what in ("cpu_s", "disk")
        )
        print(
            f"{way:16} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"CPU {cpu:.2f} s, from storage {disk / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
