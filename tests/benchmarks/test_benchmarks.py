"""The benchmark scripts run, plainly and under torchrun, and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import simulated_accelerator
import torch
from conftest import ROOT, TESTS

SCRIPT = str(ROOT / "benchmarks" / "benchmark_weight_loading.py")
sys.path.insert(0, str(ROOT / "benchmarks"))


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "model" / "part"
    run(
        ROOT / "benchmarks" / "checkpoints/synth.py",
        folder,
        "--model",
        "small-tensors",
        "--layers",
        "2",
        "--shards",
        "3",
    )
    return folder


def test_synthetic_checkpoints_are_what_they_say(checkpoint: Path) -> None:
    import weightload

    files = weightload.resolve_safetensors_files(checkpoint)
    assert len(files) == 3
    tensors = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    assert len(tensors) == 2000
    assert len({bytes(t.view(-1).view(torch.uint8).tolist()) for t in tensors.values()}) == 2000


def test_architectures_have_the_real_models_tensors() -> None:
    from checkpoints.architectures import ARCHITECTURES
    from checkpoints.synth import entry_bytes, layers_for

    sizes = {}
    for name, architecture in ARCHITECTURES.items():
        entries = architecture.entries()
        assert len({entry[0] for entry in entries}) == len(entries)
        sizes[name] = (len(entries), round(sum(map(entry_bytes, entries)) / 1e9, 1))
    assert sizes["llama-3-8b"] == (291, 16.1)
    assert sizes["wan2.1-14b"] == (1095, 57.2)
    assert sizes["qwen3-30b-a3b"] == (18867, 61.1)
    assert sizes["hunyuanvideo"][1] == 25.6
    llama = ARCHITECTURES["llama-3-8b"]
    layers = layers_for(llama, 4)
    assert sum(map(entry_bytes, llama.entries(layers))) >= 4e9 > sum(map(entry_bytes, llama.entries(layers - 1)))


def test_plain(checkpoint: Path, tmp_path: Path) -> None:
    out = run(
        SCRIPT, "--model-path", checkpoint.parent, "--subfolder", checkpoint.name, "--warmup", 0, "--repeats", 2,
        "--cold", "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    for word in (
        "cold",
        "warm",
        "touched",
        "untouched",
        "GB/s",
        "safetensors",
        "weightload pread",
        "raw parallel read",
    ):
        assert word in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["tensors"], result["files"], result["ranks"]) == (2000, 3, 1)
    assert len(result["rows"]) == (2 + 2 + 1) * 5
    for row in result["rows"]:
        assert len(row["seconds"]) == (2 if row["touched"] else 1)
        assert row["best_s"] <= row["median_s"]
        assert row["gb_per_s"] > 0
    assert result["versions"]["safetensors"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_first_loads(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "first.json"
    command = [
        "--model-path",
        os.path.relpath(checkpoint),
        "--rounds",
        1,
        "--old",
        os.path.relpath(ROOT),
        "--json",
        out,
    ]
    printed = run(ROOT / "benchmarks" / "first_loads.py", *command)
    assert "old" in printed
    result = json.loads(out.read_text())
    assert {"huge_pages", "page_reporting", "kernel", "commit"} <= result.keys()
    states = [(cell["memory"], cell["cache"]) for cell in result["cells"]]
    assert states[0] == ("as it comes", "warm")  # what a server meets comes first
    assert len(set(states)) == 4
    arms = {"safetensors", "safetensors clone", "weightload", "weightload pread"}
    for cell in result["cells"]:
        assert arms < set(cell["seconds"]) == arms | {"weightload (old)", "weightload pread (old)"}
        assert all(seconds > 0 for times in cell["seconds"].values() for seconds in times)


def test_old_and_new(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.json"
    command = ["--old", os.path.relpath(ROOT), "--model-path", os.path.relpath(checkpoint), "--rounds", 1, "--loads", 1]
    run(ROOT / "benchmarks" / "old_and_new.py", *command, "--ways", "parameters", "--json", out)
    (model,) = json.loads(out.read_text())["models"]
    assert [row["way"] for row in model["rows"]] == ["parameters"]


def test_reload(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "reload.json"
    command = ["--model-path", checkpoint, "--rounds", 1, "--tmpfs", tmp_path, "--json", out]
    assert "is not a tmpfs" in run(ROOT / "benchmarks" / "reload.py", *command)
    (row,) = json.loads(out.read_text())["rows"]
    ways = {
        "copy from memory to memory",
        "weightload load_into",
        "safetensors load_state_dict",
        "safetensors get_slice",
    }
    assert set(row["seconds"]) == ways
    assert row["bytes"] > 0


def test_busy_server(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "busy.json"
    model = next(checkpoint.glob("*.safetensors"))
    command = ["--model-path", model, "--loads", 2, "--threads", 5, "--json", out]
    assert "p99" in run(ROOT / "benchmarks" / "busy_server.py", *command)
    result = json.loads(out.read_text())
    assert [row["file"] for row in result["rows"]] == ["lora.safetensors", model.name]
    for row in result["rows"]:
        assert {name: len(times) for name, times in row["seconds"].items()} == dict.fromkeys(
            ("safetensors", "weightload", "safetensors clone", "weightload pread"), 2
        )


def test_under_torchrun(checkpoint: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    json_file = tmp_path / "r.json"
    out = run(*launcher, SCRIPT, "--model-path", checkpoint, "--repeats", 1, "--warmup", 0, "--json", json_file)
    assert out.count("GB/s") >= 1
    assert out.count("2 rank(s)") == 1  # the first rank speaks
    assert json.loads(json_file.read_text())["ranks"] == 2


def test_a_file_that_cannot_be_evicted_is_not_called_cold(checkpoint: Path) -> None:
    from harness.machine import NotEvictedError, evict

    import weightload

    files = weightload.resolve_safetensors_files(checkpoint)
    held = [weightload.load_file(file) for file in files]
    assert all(tensor.sum() is not None for tensors in held for tensor in tensors.values())  # mapped pages stay
    with pytest.raises(NotEvictedError):
        evict(files)
    del held
    evict(files)


@pytest.mark.simulated
def test_the_arm_for_an_accelerator(checkpoint: Path, tmp_path: Path) -> None:
    """On the simulated one: what it measures there says nothing, but that it runs."""
    simulated_accelerator.load()  # builds it, which the process below has no time for
    script = f"""
import runpy, sys
sys.path[:0] = [{str(TESTS)!r}, {str(ROOT / "benchmarks")!r}]
import simulated_accelerator
native = simulated_accelerator.load()
native.set_available(True)
native.seed_delays(0, 0)
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""
    out = tmp_path / "result.json"
    run("-c", script, "--model-path", checkpoint, "--device", "simulated:0", "--repeats", "1", "--json", out)
    result = json.loads(out.read_text())
    assert result["device"] == "simulated:0"
    loaders = {row["loader"] for row in result["rows"]}
    assert loaders == {"raw parallel read", "pinned copy", "safetensors", "safetensors .to()", "weightload"}
    assert all(row["median_s"] > 0 for row in result["rows"])


def test_sharded_loads(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "sharded.json"
    command = ["--model-path", checkpoint, "--plans", "tp2", "--states", "warm", "--rounds", 1, "--json", out]
    assert "MB of shards" in run(ROOT / "benchmarks" / "sharded_loads.py", *command)
    (row,) = json.loads(out.read_text())["rows"]
    names = {"weightload", "DCP", "get_slice", "whole tensors", "distribute_tensor", "rank 0, broadcast"}
    assert set(row["loads"]) == names
    (ours,) = row["loads"]["weightload"]
    files = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    # Two ranks: matrices are halved, the rest is on both.
    assert files / 2 < ours["wanted"] < 2 * files
    assert ours["wanted"] <= ours["read"]
    assert set(row["limits"]) == {"raw parallel read"}
    assert all(load["seconds"] > 0 and load["wanted"] == ours["wanted"]
               for loads in (row["loads"] | row["limits"]).values() for load in loads)  # fmt: skip


def test_sharded_loads_compare_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """The benchmark compares the bytes of every rank. It fails here, where weightload's way loads nothing."""
    text = (ROOT / "benchmarks" / "sharded_loads.py").read_text()
    ours = "    weightload.load_into(target, files, strict=False)\n"
    assert text.count(ours) == 1
    for path in (ROOT / "benchmarks").iterdir():
        (tmp_path / path.name).symlink_to(path)
    script = tmp_path / "sharded_loads.py"
    script.unlink()
    script.write_text(text.replace(ours, "    pass\n"))
    command = ["--model-path", checkpoint, "--plans", "fsdp2", "--states", "cold", "--rounds", 1, "--ways", "get_slice"]
    done = subprocess.run([sys.executable, script, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "weightload does not give the bytes of the files" in done.stderr
