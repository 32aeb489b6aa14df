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
from conftest import ROOT, write_tensors

SCRIPT = ROOT / "benchmarks" / "gpu" / "check.sh"
sys.path.insert(0, str(ROOT / "benchmarks"))
LOGIC_ONLY = "cpu (logic only, not a measurement)"


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
    return folder


def test_direct_read_reads_every_byte(checkpoint: Path) -> None:
    from gpu.limits import direct_read

    files = sorted(map(str, checkpoint.glob("*.safetensors")))
    try:
        for piece in (1 << 20, 8 << 20):
            assert direct_read(files, threads=3, piece=piece) == sum(map(os.path.getsize, files))
    except OSError as error:
        pytest.skip(f"no direct reads here: {error}")


def test_the_script_runs_dry(tmp_path: Path) -> None:
    assert not run("bash", "-n", SCRIPT)
    out = run("bash", SCRIPT, "--dry-run", tmp_path / "o", PYTHON=sys.executable, WEIGHTLOAD_BENCH_DIR=str(tmp_path))
    assert "FAILED" not in out
    assert out.count(f"device: {LOGIC_ONLY}") >= 2
    limits = json.loads((tmp_path / "o" / "limits.json").read_text())
    assert limits["device"] == LOGIC_ONLY
    assert len(limits["rows"]) >= 3
    tiny = json.loads((tmp_path / "o" / "tiny.json").read_text())
    assert tiny["checked"]
    assert "only for CUDA devices" in out
    check_ranks(json.loads((tmp_path / "o" / "ranks.json").read_text()), out)


def check_ranks(result: dict[str, Any], out: str) -> None:
    """Two ranks, over a backend that names the CPU and over a plain one, and no claim that this proves anything."""
    from gpu.report import UNPROVEN, markdown

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
    from gpu import ranks as gpu_ranks

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
    from gpu.ranks import reason

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
        sys.executable, ROOT / "benchmarks" / "gpu/ranks.py", "--model-path", checkpoint, "--device", "cpu", "--ranks",
        2, "--backends", "cpu:none", "gloo", "--repeats", 1, "--ways", "weightload striped", "--json", tmp_path / "r",
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    runs = json.loads((tmp_path / "r").read_text())["runs"]
    assert [(run["failed"], "result" in run) for run in runs] == [(True, False), (False, True)], done.stdout
    assert "2 ranks, cpu:none: FAILED: " in done.stdout
    assert done.returncode == 1
