"""The GPU measuring kit runs on a machine without a GPU: its logic is tested, nothing is measured."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tensors

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
sys.path.insert(0, str(ROOT / "benchmarks"))
LOGIC_ONLY = "cpu (logic only, not a measurement)"

OWN_LOADERS = """
import os
from safetensors import safe_open

def all_of(files):
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name).clone()

def one_bit_wrong(files, device):
    for name, tensor in all_of(files):
        if name == "last":
            tensor[-1, -1] += 1
        yield name, tensor

def too_early(files, device):
    for name, tensor in all_of(files):
        right = tensor.clone()
        yield name, tensor.zero_()
        tensor.copy_(right)

def one_missing(files, device):
    return (pair for pair in all_of(files) if pair[0] != "last")

def crashes(files, device):
    yield next(all_of(files))
    os.abort()

def raises(files, device):
    raise OSError(5, "broken disk")
"""


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_tensors(folder / "a.safetensors", [(f"a.{i}", "BF16", [512, 16 * i]) for i in range(16)])
    write_tensors(folder / "b.safetensors", [("scalar", "F32", []), ("last", "I32", [1000, 250])], seed=1)
    (folder / "own.py").write_text(OWN_LOADERS)
    return folder


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One comparison of loaders that are right, that cannot run here, and that fail in every way."""
    own = [f"{checkpoint}/own.py:{name}" for name in ("one_bit_wrong", "too_early", "one_missing", "crashes", "raises")]
    loaders = ["safetensors", "weightload", "instanttensor", "safetensors 0.9 prefetch", *own]
    folder = tmp_path_factory.mktemp("out")
    out = run(
        sys.executable, ROOT / "benchmarks" / "benchmark_gpu_loading.py", "--model-path", checkpoint, "--device", "cpu",
        "--warmup", 0, "--repeats", 1, "--cold", "--loaders", ",".join(loaders), "--json", folder / "r.json",
        "--plot", folder / "r.png",
    )  # fmt: skip
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "r.json").read_text()), out


def test_every_loader_is_measured_in_both_states_or_says_why_not(measured: tuple[dict[str, Any], str]) -> None:
    result, out = measured
    assert (result["files"], result["tensors"], result["checked"]) == (2, 18, True)
    assert result["bytes"] == 512 * 16 * 120 * 2 + 4 + 1_000_000
    for loader in ("safetensors", "weightload"):
        rows = [row for row in result["rows"] if row["loader"] == loader]
        assert [row["cache"] for row in rows] == ["warm", "cold"]
        for row in rows:
            assert row["reason"] is None
            assert len(row["seconds"]) == 1
            assert row["gb_per_s"] > 0 < row["of_limit"]
            assert row["version"]
        assert rows[0]["speedup"] == pytest.approx(1) or loader != "safetensors"
    for loader in ("instanttensor", "safetensors 0.9 prefetch"):
        assert all("CUDA" in row["reason"] for row in result["rows"] if row["loader"] == loader)
        assert f"{loader:34}          " in out
    assert "skipped: only for CUDA devices" in out


def test_wrong_bytes_are_reported_and_have_no_time(measured: tuple[dict[str, Any], str]) -> None:
    result, out = measured
    rows = {row["loader"].split(":")[-1]: row for row in result["rows"]}
    assert rows["one_bit_wrong"]["wrong"].startswith("last: bytes differ")
    assert rows["too_early"]["wrong"].startswith("as it was yielded: ")
    assert "1 names are missing" in rows["one_missing"]["wrong"]
    for loader in ("one_bit_wrong", "too_early", "one_missing"):
        assert rows[loader]["median_s"] is None
        assert f"WRONG: {rows[loader]['wrong']}" in out


def test_a_loader_that_fails_ends_alone(measured: tuple[dict[str, Any], str]) -> None:
    rows = {row["loader"].split(":")[-1]: row for row in measured[0]["rows"]}
    assert "SIGABRT" in rows["crashes"]["reason"]
    assert rows["raises"]["reason"] == "OSError: [Errno 5] broken disk"
    assert rows["raises"]["wrong"] is None


def test_results_without_a_gpu_say_so(measured: tuple[dict[str, Any], str]) -> None:
    from gpu_report import markdown, short

    result, out = measured
    assert result["device"] == LOGIC_ONLY
    for text in (out, markdown(result), "\n".join(short(result))):
        assert f"device: {LOGIC_ONLY}" in text
    assert result["versions"]["torch"] == torch.__version__


def test_direct_read_reads_every_byte(checkpoint: Path) -> None:
    from gpu_limits import direct_read

    files = sorted(map(str, checkpoint.glob("*.safetensors")))
    try:
        assert direct_read(files, threads=3) == sum(map(os.path.getsize, files))
    except OSError as error:
        pytest.skip(f"no direct reads here: {error}")


def test_the_script_runs_dry(tmp_path: Path) -> None:
    assert not run("bash", "-n", SCRIPT)
    out = run("bash", SCRIPT, "--dry-run", tmp_path / "o", PYTHON=sys.executable, WEIGHTLOAD_BENCH_DIR=str(tmp_path))
    assert "FAILED" not in out
    assert out.count(f"device: {LOGIC_ONLY}") >= 2
    for name in ("limits", "tiny"):
        result = json.loads((tmp_path / "o" / f"{name}.json").read_text())
        assert result["device"] == LOGIC_ONLY
        assert len(result["rows"]) >= 3
    check_ranks(json.loads((tmp_path / "o" / "ranks.json").read_text()), out)


def check_ranks(result: dict[str, Any], out: str) -> None:
    """Two ranks, over a backend that names the CPU and over a plain one, and no claim that this proves anything."""
    from gpu_report import UNPROVEN, markdown

    assert (result["device"], result["nccl"], result["unproven"]) == (LOGIC_ONLY, "none", True)
    assert [(run["ranks"], run["backend"], run["reason"]) for run in result["runs"]] == [
        (2, "cpu:gloo", None),
        (2, "gloo", None),
    ]
    for run in result["runs"]:
        compared = run["result"]
        assert (compared["ranks"], compared["backend"]) == (2, run["backend"])
        assert compared["identical_bytes"]
        speedups = {row["way"]: row["speedup"] for row in compared["rows"] if not row["limit"]}
        assert list(speedups) == ["python broadcast", "weightload broadcast", "weightload striped"]
        assert all(speedups.values())
    for text in (out, markdown(result)):
        assert UNPROVEN in text
        assert "2 ranks, gloo: every byte right" in text


@pytest.mark.parametrize(("old", "new"), [(22809, 23203), (23000, 0), (22809, 22809), (22809, 0)])
def test_ranks_share_a_gpu_only_over_an_nccl_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: int, new: int
) -> None:
    """torch's own NCCL, else the kit's, which is unpacked and preloaded; else a reason. 0: the kit has none."""
    import gpu_ranks

    monkeypatch.setattr(gpu_ranks, "nccl_version", lambda environ: new if "LD_PRELOAD" in environ else old)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    packed = tmp_path / "libnccl.so.2.xz"
    if new:
        packed.write_bytes(lzma.compress(b"the library"))
    environ, version, why = gpu_ranks.prepared(packed, tmp_path)
    assert environ["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert version == max(old, new)
    if old >= 23000:
        assert (environ.get("LD_PRELOAD"), why) == (None, None)
    elif new:
        assert Path(environ["LD_PRELOAD"]).read_bytes() == b"the library"
        assert (why is None) == (new >= 23000)
    if why:
        assert why.startswith("NCCL 2.28.9 lets no two ranks share a GPU")
        assert ("there is no" in why) == (new == 0)


def test_why_a_run_of_ranks_failed() -> None:
    from gpu_ranks import reason

    end = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "
    said = "torch.distributed.DistBackendError: NCCL error: invalid usage"
    assert reason(f"{said}\nDuplicate GPU detected : rank 1\n{end}") == (True, "Duplicate GPU detected : rank 1")
    wrong = "weightload striped does not give the bytes of the files: rank 1: 1 tensors, such as 'a'"
    assert reason(f"{wrong}\nValueError: later\n{end}") == (False, wrong)
    assert reason(f"RuntimeError: first\nOSError: last\n{end}") == (False, "OSError: last")
    assert reason("") == (False, "failed without a word")


def test_ranks_that_fail_are_reported_and_do_not_keep_others_from_running(checkpoint: Path, tmp_path: Path) -> None:
    """A backend that does not exist, then one that does: both are in the result, and the status says it."""
    command = [
        sys.executable, ROOT / "benchmarks" / "gpu_ranks.py", "--model-path", checkpoint, "--device", "cpu", "--ranks",
        2, "--backends", "cpu:none", "gloo", "--repeats", 1, "--ways", "weightload striped", "--json", tmp_path / "r",
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    runs = json.loads((tmp_path / "r").read_text())["runs"]
    assert [(run["failed"], "result" in run) for run in runs] == [(True, False), (False, True)], done.stdout
    assert "2 ranks, cpu:none: FAILED: " in done.stdout
    assert done.returncode == 1
