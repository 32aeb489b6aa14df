"""Shared by the tests of the engines: when they run, checkpoints, and runs of an engine in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
STAND_INS = HERE / "stand_ins"


def needs(engine: str) -> pytest.MarkDecorator:
    """Skips a test where the engine is not installed."""
    missing = importlib.util.find_spec(engine) is None
    return pytest.mark.skipif(missing, reason=f"{engine} is not installed; make test-engines installs it")


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> list[Path]:
    """Save the tensors in ``count`` files with an index, named as the engines expect them."""
    folder.mkdir(parents=True, exist_ok=True)
    files, places = [], {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        chosen = {key: tensor for place, (key, tensor) in enumerate(tensors.items()) if place % count == number}
        save_file(chosen, folder / name, metadata={"format": "pt"})
        files.append(folder / name)
        places.update(dict.fromkeys(chosen, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and shapes, more than one in each of a few files."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(64, 48, generator=generator).bfloat16() for i in range(9)}
    tensors |= {f"layers.{i}.bias": torch.randn(33 + i, generator=generator) for i in range(9)}
    return tensors | {"scale": torch.tensor(2.5), "empty": torch.empty(0, 4), "steps": torch.arange(7)}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two loads have the same names and tensors."""
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def free_port() -> int:
    """A port that nobody listens on, now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(script: str, ranks: int, *arguments: object, **variables: str) -> list[dict[str, Any]]:
    """Run a script beside this one in ``ranks`` processes. Return what each writes: JSON, the last line of its output.

    Its arguments are the rank, the number of ranks, a port, and the given ones.
    """
    paths = [str(STAND_INS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(rank), str(ranks), str(port), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in started]
    finally:  # one that waits for another that has failed
        for process in started:
            process.kill()
    for process, (written, said) in zip(started, outputs, strict=True):
        assert process.returncode == 0, written[-2000:] + said[-4000:]
    return [json.loads(written.splitlines()[-1]) for written, _ in outputs]
