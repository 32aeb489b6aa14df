"""Measures a framework's own call with weightload installed in it, against the same call without.

    python benchmarks/framework_loads.py [--frameworks transformers diffusers accelerate] [--gigabytes 1.5] [--rounds 7]
        [--states cold warm] [--memories "as it comes" "touched before"] [--device cuda:0] [--ahead N]
        [--folder DIR] [--json FILE]

Wants the frameworks installed (`make test-frameworks` has an environment with them). A model of random bytes is saved
by the framework itself, in shards: a Llama (`AutoModelForCausalLM.from_pretrained`), a Wan transformer
(`WanTransformer3DModel.from_pretrained`), the Llama again by accelerate (`load_checkpoint_in_model`, into a model
without memory). Each load is a process of its own, which has imported everything and installed weightload, or not,
before the clock starts. With and without take turns, in another order each round, each from the same state: warm, or
evicted and verified so; memory as it comes, or touched by another process a moment before. Told are seconds until
the call returns, and until every page of the model was touched as well; and that the bytes were the same: a sum over
all of them. A ratio in brackets is one that an exact rank-sum test (5 %) cannot tell from 1. A whole start is that from
the process's first moment to the end of a first step (one forward of a few tokens); told is the loading's share of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from first_loads import MEMORIES, against
from harness.machine import back_memory_elsewhere, describe, evict, fill_cache

FRAMEWORKS = ("transformers", "diffusers", "accelerate")
STATES = ("cold", "warm")
WAYS = ("weightload", "safetensors")
SHARD = "500MB"


def llama_config(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip


def make_model(framework: str, folder: Path, gigabytes: float, device: str) -> None:
    """Save a model of about ``gigabytes`` GB, with random weights, made on the device."""
    import torch

    torch.manual_seed(0)
    if framework == "diffusers":
        from diffusers import WanTransformer3DModel

        layers = max(2, round(gigabytes * 1e9 / 2 / 47.2e6))
        with torch.device(device):
            model: Any = WanTransformer3DModel(
                num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers, text_dim=4096
            )
    else:
        from transformers import LlamaForCausalLM

        layers = max(2, round((gigabytes * 1e9 / 2 - 131e6) / 45.1e6))
        with torch.device(device):
            model = LlamaForCausalLM(llama_config(layers))
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size=SHARD)


def load(framework: str, folder: Path, device: str) -> Any:
    """The framework's own call; what that would import is imported now, as ``install`` does."""
    import torch

    where: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    if framework == "diffusers":
        from diffusers import WanTransformer3DModel

        return lambda: WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, **where)
    import transformers.trainer_utils  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    if framework == "transformers":
        return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **where)
    from accelerate import init_empty_weights, load_checkpoint_in_model
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    models: Any = AutoModelForCausalLM

    def by_accelerate() -> Any:
        with init_empty_weights():
            model = models.from_config(config, dtype=torch.bfloat16)
        load_checkpoint_in_model(model, str(folder), device_map={"": device})
        return model

    return by_accelerate


def first_step(framework: str, model: Any) -> None:
    """One forward of a few tokens."""
    import torch

    with torch.no_grad(), torch.device(next(model.parameters()).device):
        if framework == "diffusers":
            pixels = torch.zeros(1, 16, 1, 8, 8, dtype=torch.bfloat16)
            text = torch.zeros(1, 8, 4096, dtype=torch.bfloat16)
            model(hidden_states=pixels, timestep=torch.tensor([1]), encoder_hidden_states=text)
        else:
            model(torch.arange(8)[None])
    synchronize(model)


def synchronize(model: Any) -> None:
    """Until the model's device has done what was queued."""
    import torch

    device = next(model.parameters()).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def age() -> float:
    """Seconds since this process was started, to a hundredth."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def touch(model: Any) -> None:
    """One byte of each page, as a first forward would have it; on a device, until all is there."""
    import torch

    if next(model.parameters()).device.type != "cpu":
        synchronize(model)
        return
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum(dtype=torch.int64)


def one(way: str, framework: str, folder: Path, memory: str, device: str) -> dict[str, Any]:
    """In a process of its own, which says when it is ready, and loads when it is told to."""
    import torch

    torch.zeros(1, device=device)  # what the first use of a device does is not the load's
    call = load(framework, folder, device)
    if way == "weightload":
        import weightload

        weightload.install(framework)
    imported = age()
    print("ready", flush=True)
    sys.stdin.readline()
    if memory != MEMORIES[0]:  # now: what was touched before the imports, the host has taken back
        back_memory_elsewhere(3 * sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    begin = time.perf_counter()
    model = call()
    returned = time.perf_counter()
    touch(model)
    touched = time.perf_counter()
    first_step(framework, model)
    stepped = time.perf_counter()
    digest = sum(int(p.detach().view(torch.int16).sum(dtype=torch.int64)) for p in model.parameters())
    return {
        "import": imported,
        "returned": returned - begin,
        "touched": touched - begin,
        "step": stepped - touched,
        "digest": digest,
        "bytes": sum(p.nbytes for p in model.parameters()),
    }


class Start:
    """A process that has yet to load."""

    def __init__(self, way: str, framework: str, folder: Path, memory: str, device: str) -> None:
        command = [sys.executable, __file__, "--one", way, "--frameworks", framework, "--folder", str(folder)]
        command += ["--memories", memory, "--device", device]
        self.way, self.files = way, sorted(str(path) for path in folder.glob("*.safetensors"))
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )

    def ready(self) -> None:
        """Wait until it has imported everything."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) != "ready\n":
            if not line:
                self._fail()

    def load(self, state: str) -> dict[str, Any]:
        """From this state of the page cache."""
        (evict if state == "cold" else fill_cache)(self.files)
        out, _ = self._process.communicate("\n")
        if self._process.returncode:
            self._fail()
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def _fail(self) -> None:
        self._process.wait()
        self._said.seek(0)
        raise SystemExit(f"a load by {self.way} failed:\n{self._said.read()[-3000:]}")


def loads_in_turns(framework: str, folder: Path, memory: str, state: str, options: argparse.Namespace) -> Any:
    """Pairs of a way and what its load told; the first of each way is not counted, unless processes start ahead."""
    order = [way for _ in range(options.rounds + 1) for way in random.sample(WAYS, len(WAYS))]
    uncounted = len(WAYS)
    if options.ahead > 1:
        order, uncounted = order[len(WAYS) :], 0
    for at in range(0, len(order), options.ahead):
        started = [Start(way, framework, folder, memory, options.device) for way in order[at : at + options.ahead]]
        for process in started:
            process.ready()
        for process in started:
            found = process.load(state)
            if uncounted:
                uncounted -= 1
            else:
                yield process.way, found


def measure(framework: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each state of the page cache and of memory: what each load told."""
    rows = []
    for memory in options.memories:
        for state in options.states:
            loads: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for way, found in loads_in_turns(framework, folder, memory, state, options):
                loads[way].append(found)
            every = [load for found in loads.values() for load in found]
            if len({(load["digest"], load["bytes"]) for load in every}) != 1:
                raise SystemExit(f"{framework}: not all loads gave the same bytes")
            rows.append({"framework": framework, "state": state, "memory": memory, "loads": loads})
            print_row(rows[-1], options.ahead == 1)
    return rows


def share(loads: list[dict[str, Any]]) -> str:
    """The seconds of a whole start, and the share of them that the load takes."""
    whole, loading = (
        statistics.median(sum(load[part] for part in parts) for load in loads)
        for parts in (("import", "touched", "step"), ("touched",))
    )
    return f"start {whole:.2f} s, of it {loading / whole:.0%}"


def print_row(row: dict[str, Any], whole: bool) -> None:
    line = f"{row['framework']:13} {row['state']:5} {row['memory']:15}"
    for what in ("returned", "touched"):
        theirs, ours = ([load[what] for load in row["loads"][way]] for way in ("safetensors", "weightload"))
        line += f"  {what}"
        for found in (theirs, ours):
            line += f" {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})"
        line += f" {against(theirs, ours)} times"
    shares = [share(row["loads"][way]) for way in ("safetensors", "weightload")] if whole else []
    print(line, *shares, sep="  ", flush=True)


def facts(device: str, folder: Path) -> dict[str, Any]:
    """The machine, as a result describes it."""
    if device == "cpu":
        return describe([str(folder)])
    import torch
    from gpu.limits import environment

    found = environment(torch.device(device), [str(folder)])
    found["versions"] |= {name: importlib.metadata.version(name) for name in FRAMEWORKS if find_spec(name)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(".build/framework-models"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ahead", type=int, default=1, metavar="N", help="processes that start at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.frameworks[0], options.folder, options.memories[0], options.device)))
        return
    rows = []
    for framework in options.frameworks:
        folder = options.folder / ("wan" if framework == "diffusers" else "llama")
        if not (folder / "config.json").exists():
            make_model(framework, folder, options.gigabytes, options.device)
        rows += measure(framework, folder, options)
    if options.json:
        found = {**facts(options.device, options.folder), "benchmark": "framework loads", "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
