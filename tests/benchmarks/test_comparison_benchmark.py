"""Loads by several ranks are compared plainly, under torchrun and on two hosts, and their bytes are checked."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, write_tensors

BENCHMARKS = ROOT / "benchmarks"
COMPARISON = BENCHMARKS / "benchmark_weight_loading_comparison.py"
LOADING = BENCHMARKS / "benchmark_weight_loading.py"
sys.path.insert(0, str(BENCHMARKS))

LIMITS = ["raw parallel read", "raw broadcast"]
WAYS = [
    "python independent",
    "python broadcast",
    "python async broadcast",
    "weightload independent",
    "weightload independent pread",
    "weightload broadcast",
    "weightload striped",
    "weightload auto",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(*command: object, fails: bool = False) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, with an empty tensor, a scalar, and dtypes that gloo cannot broadcast."""
    folder = tmp_path_factory.mktemp("comparison") / "model"
    folder.mkdir()
    odd = [("empty", "F32", [0, 3]), ("scalar", "I16", []), ("float8", "F8_E4M3", [5, 7]), ("unsigned", "U16", [9])]
    write_tensors(folder / "a.safetensors", [*odd, *((f"a.{i}", "BF16", [i + 1, 100]) for i in range(8))], seed=1)
    write_tensors(folder / "b.safetensors", [("large", "F32", [300, 1000]), ("byte", "U8", [1])], seed=2)
    return folder


def check_result(result: dict[str, Any], ranks: int, repeats: int, ways: list[str], group_ranks: int) -> None:
    assert result["benchmark"] == "weight_loading_comparison"
    assert (result["ranks"], result["group_ranks"], result["repeats"]) == (ranks, group_ranks, repeats)
    assert (result["files"], result["tensors"], result["backend"], result["device"]) == (2, 14, "gloo", "cpu")
    assert (result["cache"], result["cache_verified"], result["identical_bytes"]) == ("warm", True, True)
    assert result["machine"]
    assert result["versions"]["torch"]
    rows = {row["way"]: row for row in result["rows"]}
    limits = LIMITS if group_ranks > 1 else LIMITS[:1]
    assert list(rows) == limits + ways
    assert [row["limit"] for row in result["rows"]] == [True] * len(limits) + [False] * len(ways)
    medians = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
    for name, row in rows.items():
        assert len(row["seconds"]) == repeats
        assert row["median_s"] == medians[name]
        assert row["best_s"] == min(row["seconds"])
        assert row["gb_per_s"] == pytest.approx(result["bytes"] / 1e9 / medians[name])
        assert row["of_raw_read"] == pytest.approx(medians["raw parallel read"] / medians[name])
        expected = medians["python broadcast"] / medians[name] if name in ways and "python broadcast" in ways else None
        assert row["speedup"] == pytest.approx(expected)
        assert row["agreement_share"] is None or 0 <= row["agreement_share"] <= 1


def test_plain(checkpoint: Path, tmp_path: Path) -> None:
    out = run(
        sys.executable, COMPARISON, "--model-path", checkpoint.parent, "--subfolder", checkpoint.name, "--device",
        "cpu", "--warmup", 0, "--repeats", 2, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png",
        "--title", "tiny",
    )  # fmt: skip
    for word in ("tiny", "1 rank(s)", "warm, verified", *WAYS):
        assert word in out
    result = json.loads((tmp_path / "r.json").read_text())
    check_result(result, 1, 2, WAYS, group_ranks=1)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    table = run(sys.executable, BENCHMARKS / "report/results.py", tmp_path / "r.json")
    assert "**tiny**" in table
    assert all(f"| {way} " in table for way in WAYS)


def test_two_ranks(checkpoint: Path, tmp_path: Path) -> None:
    out = run(
        *TORCHRUN, 2, COMPARISON, "--model-path", checkpoint, "--device", "cpu", "--warmup", 1, "--repeats", 3,
        "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    for word in ("2 rank(s) on 1 node(s)", *LIMITS, *WAYS):
        assert word in out
    assert out.count("python broadcast  ") == 1  # the first rank speaks
    result = json.loads((tmp_path / "r.json").read_text())
    check_result(result, 2, 3, WAYS, group_ranks=2)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_ways_can_be_picked(checkpoint: Path, tmp_path: Path) -> None:
    picked = ["python independent", "weightload independent"]
    common = [sys.executable, COMPARISON, "--model-path", checkpoint, "--device", "cpu", "--repeats", 1]
    run(*common, "--ways", ",".join(picked), "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    check_result(json.loads((tmp_path / "r.json").read_text()), 1, 1, picked, group_ranks=1)
    assert "no such way: fast" in run(*common, "--ways", "fast", fails=True)


def test_wrong_bytes_are_seen(checkpoint: Path) -> None:
    import safetensors.torch
    from harness.group_run import differences

    files = [str(checkpoint / "a.safetensors"), str(checkpoint / "b.safetensors")]

    def tensors() -> dict[str, torch.Tensor]:
        return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}

    assert differences(tensors(), files) == []
    wrong = tensors()
    wrong["large"].view(torch.uint8)[-1, -1] ^= 1
    wrong["scalar"] = wrong["scalar"].reshape(1)
    wrong["more"] = wrong["byte"]
    del wrong["empty"]
    assert differences(wrong, files) == ["empty", "large", "more", "scalar"]


def test_wrong_bytes_end_the_run_on_every_rank(checkpoint: Path, tmp_path: Path) -> None:
    """One rank of two gets a wrong byte; the other ends too, and nothing is measured."""
    script = tmp_path / "wrong.py"
    script.write_text(
        f"""
import os, runpy, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from loaders import group_ways
def wrong(place):
    for name, tensor in group_ways.python_independent(place):
        if os.environ["RANK"] == "1" and name == "byte":
            tensor += 1
        yield name, tensor
group_ways.WAYS["python independent"] = wrong
runpy.run_path({str(COMPARISON)!r}, run_name="__main__")
"""
    )
    errors = run(
        *TORCHRUN, 2, script, "--model-path", checkpoint, "--device", "cpu", "--ways", "python independent",
        "--json", tmp_path / "r.json", fails=True,
    )  # fmt: skip
    message = "python independent does not give the bytes of the files: rank 1: 1 tensors, such as 'byte'"
    assert errors.count(message) == 2
    assert not (tmp_path / "r.json").exists()


def test_figures_are_of_medians() -> None:
    from harness.group_run import Timing, summarise

    timings = {
        "raw parallel read": [Timing(0.5), Timing(0.5), Timing(0.5)],
        "python broadcast": [Timing(9.0), Timing(4.0), Timing(3.0)],
        "weightload striped": [Timing(1.0, 0.5), Timing(2.0, 0.2), Timing(8.0, 2.0)],
    }
    rows = {row["way"]: row for row in summarise(timings, total=10**9)}
    ours = rows["weightload striped"]
    assert (ours["median_s"], ours["best_s"], ours["gb_per_s"]) == (2.0, 1.0, 0.5)
    assert (ours["speedup"], ours["of_raw_read"], ours["of_raw_broadcast"]) == (2.0, 0.25, None)
    assert (ours["agreement_seconds"], ours["agreement_share"]) == ([0.5, 0.2, 2.0], 0.25)
    assert (rows["python broadcast"]["speedup"], rows["python broadcast"]["agreement_share"]) == (1.0, None)
    assert rows["raw parallel read"]["speedup"] is None


def test_agreement_is_asked_of_the_iterator() -> None:
    from harness.group_run import UNKNOWN, load
    from loaders.group_ways import Place

    class Weights:
        agreement_seconds: float | None = 0.25
        strategy = "striped"

        def __iter__(self) -> Any:
            yield "one", torch.ones(3)

    place = Place([], torch.device("cpu"), None)  # type: ignore[arg-type]
    timing, tensors = load(lambda _: Weights(), place)  # type: ignore[arg-type,return-value]
    assert (timing.agreement_seconds, timing.strategy, list(tensors)) == (0.25, "striped", ["one"])
    assert load(lambda _: iter([("one", torch.ones(3))]), place)[0].agreement_seconds == UNKNOWN


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs a torchrun on two hosts, where this machine lets us make them."""
    name = f"weightload-try-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        probe = made if made.returncode else subprocess.run(
            ["ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1"],
            capture_output=True, text=True,
        )  # fmt: skip
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    except FileNotFoundError:
        pytest.skip("two hosts need network namespaces, and the command ip (iproute2) is not installed")
    if probe.returncode:
        pytest.skip(f"two hosts need network namespaces, which cannot be made here: {probe.stderr.strip()}")
    torchrun = tmp_path_factory.mktemp("launcher") / "torchrun"  # this interpreter's
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    return [str(BENCHMARKS / "two_hosts.sh"), str(torchrun), "--nproc-per-node"]


@pytest.mark.parametrize(("ranks_a_node", "group"), [(1, "all"), (2, "node")])
def test_two_hosts(checkpoint: Path, tmp_path: Path, two_hosts: list[str], ranks_a_node: int, group: str) -> None:
    out = run(
        *two_hosts, ranks_a_node, COMPARISON, "--model-path", checkpoint, "--device", "cpu", "--group", group,
        "--warmup", 0, "--repeats", 1, "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert f"{2 * ranks_a_node} rank(s) on 2 node(s), in groups of 2" in out
    assert out.count("python broadcast  ") == 1
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["nodes"], result["group"]) == (2, group)
    check_result(result, 2 * ranks_a_node, 1, WAYS, group_ranks=2)


def test_independent_loads_on_two_hosts(checkpoint: Path, tmp_path: Path, two_hosts: list[str]) -> None:
    out = run(
        *two_hosts, 1, LOADING, "--model-path", checkpoint, "--cold", "--warmup", 0, "--repeats", 1,
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert out.count("2 rank(s) on 2 nodes") == 1
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["ranks"], result["nodes"]) == (2, 2)
    assert {row["cache"] for row in result["rows"]} == {"cold", "warm", "warm 4K"}


def namespaces(script: subprocess.Popen[str]) -> list[str]:
    """Those that a running two_hosts.sh has made; their names have its process id."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"weightload-{script.pid}-")]


@pytest.mark.parametrize("end", ["failure", "signal"])
def test_two_hosts_leave_nothing_behind(tmp_path: Path, two_hosts: list[str], end: str) -> None:
    """One rank says where it is and fails, or both stay until the script is told to end."""
    script = tmp_path / "stay.py"
    script.write_text(
        """
import os, sys, threading
os.write(1, f"process {os.getpid()}\\n".encode())  # in one piece
if os.environ["RANK"] == "1" and sys.argv[1] == "failure":
    sys.exit(3)
threading.Event().wait()
"""
    )
    command = [*two_hosts, "1", str(script), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        try:
            assert running.stdout is not None
            said = [running.stdout.readline().split() for _ in range(2)]
            if end == "signal":
                assert len(namespaces(running)) == 2
                running.send_signal(signal.SIGTERM)
            assert running.wait(timeout=120) == (143 if end == "signal" else 1)
            assert namespaces(running) == []
        finally:
            running.terminate()
    assert [words[0] for words in said] == ["process"] * 2
    for words in said:
        assert not Path(f"/proc/{words[1]}").exists()
