"""All loaders are compared in one run: what is right is measured, what is not says why. Nothing here is timed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TESTS, write_tensors

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

OWN_LOADERS = """
import os, threading
import torch
from safetensors import safe_open

def views(files):
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)

def all_of(files):
    return ((name, tensor.clone()) for name, tensor in views(files))

def right(files, device):
    return Told(all_of(files))

class Told:
    def __init__(self, weights):
        self.weights = weights
    def __iter__(self):
        return self.weights
    def stats(self):
        return self
    def as_dict(self):
        stages = {"read": {"seconds": 0.75, "bytes": 8}, "copy": {"seconds": 0.25, "bytes": 8}}
        return {"seconds": 1.0, "bytes": 8, "stages": stages, "files": [], "bottleneck": "read"}

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

def memory_used_again(files, device):
    buffer = torch.empty(16 << 20, dtype=torch.uint8)
    for name, tensor in views(files):
        place = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        yield name, place.copy_(tensor)

def one_missing(files, device):
    return (pair for pair in all_of(files) if pair[0] != "last")

def not_private(files, device):
    return views(files)

def crashes(files, device):
    yield next(all_of(files))
    os.abort()

def hangs(files, device):
    yield next(all_of(files))
    threading.Event().wait()

def raises(files, device):
    raise OSError(5, "broken disk")
"""
RIGHT = ("right",)
FAILING = (
    "one_bit_wrong",
    "too_early",
    "memory_used_again",
    "one_missing",
    "not_private",
    "crashes",
    "hangs",
    "raises",
)


def run(script: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, BENCHMARKS / script, *arguments]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_tensors(folder / "a.safetensors", [(f"a.{i}", "BF16", [512, 16 * i]) for i in range(16)])
    write_tensors(folder / "b.safetensors", [("scalar", "F32", []), ("last", "I32", [1000, 250])], seed=1)
    (folder / "own.py").write_text(OWN_LOADERS)
    return folder


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One comparison of loaders that are right, that cannot run here, and that fail in every way."""
    own = [f"{checkpoint}/own.py:{name}" for name in (*RIGHT, *FAILING)]
    loaders = [
        "safetensors", "weightload", "weightload load_file", "safetensors clone", "weightload pread",
        "safetensors load_state_dict", "weightload load_into", "instanttensor", "safetensors 0.9", *own,
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("out")
    out = run(
        "compare_loaders.py", "--model-path", checkpoint, "--repeats", 2, "--heats", 1, "--fresh", 1, "--cold",
        "--tmpfs", folder / "none", "--limit-s", 15, "--seed", 7, "--loaders", ",".join(loaders), "--title", "tiny",
        "--json", folder / "r.json", "--plot", folder / "r.png",
        WEIGHTLOAD_PEERS=str(folder / "nothing"),
    )  # fmt: skip
    return json.loads((folder / "r.json").read_text()), out, folder


def scenario(result: dict[str, Any], cache: str, kind: str) -> dict[str, Any]:
    return next(s for s in result["scenarios"] if (s["place"], s["cache"], s["kind"]) == ("disk", cache, kind))


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["loader"].split(".py:")[-1]: row for row in found["rows"]}


def test_every_scenario_has_its_loaders_and_limits(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, out, _ = measured
    assert (result["files"], result["tensors"], result["device"]) == (2, 18, "cpu")
    assert [text.partition(":")[0] for text in result["checked"]] == [
        "one untimed load of each loader",
        "every timed load",
    ]
    assert all(f"compared with the files: {text}" in out for text in result["checked"])
    assert result["bytes"] == 512 * 16 * 120 * 2 + 4 + 1_000_000
    assert [(s["place"], s["cache"], s["kind"]) for s in result["scenarios"]] == [
        ("disk", "warm", "mapped"),
        ("disk", "warm", "private"),
        ("disk", "warm", "into"),
        ("disk", "cold", "mapped"),
        ("disk", "cold", "private"),
        ("tmpfs", "warm", "mapped"),
        ("tmpfs", "warm", "private"),
    ]
    for found in result["scenarios"][:5]:
        assert found["reason"] is None
        held = [limit for limit in found["limits"] if limit["held_against"]]
        assert found["limit"] in [limit["limit"] for limit in held] or all(limit["reason"] for limit in held)
        for row in found["rows"]:
            if row["of"] == "weightload" and row["best_setting"]:
                assert len(row["seconds"]) == 2
                assert row["best_s"] <= row["quartile1_s"] <= row["median_s"] <= row["quartile3_s"] <= row["worst_s"]
                assert row["gb_per_s"] > 0 < row["of_limit"]
                assert row["cpu_s"] > 0
                assert row["version"]
        assert found["verdict"].startswith("first: ")
        assert found["verdict"] in out
    for found in result["scenarios"][5:]:
        assert "is not a tmpfs" in found["verdict"]


def test_only_the_best_setting_of_each_goes_on(measured: tuple[dict[str, Any], str, Path]) -> None:
    """Two settings of weightload in the heat, one in what is counted, where the heat is not; and in new processes."""
    found = rows_of(scenario(measured[0], "warm", "mapped"))
    dropped, best = sorted((found["weightload"], found["weightload load_file"]), key=lambda row: row["best_setting"])
    assert dropped["heat_seconds"] > best["heat_seconds"]
    for row, rounds in ((dropped, 0), (best, 1)):
        assert [len(row[key]) for key in ("heat_seconds", "seconds", "fresh_seconds")] == [1, 2 * rounds, rounds]
        assert (row["median_s"] is not None) == (row["fresh_s"] is not None) == row["best_setting"] == bool(rounds)
        assert row["dropped_after_heats"] == (not rounds)
    # Nobody else of its owner is there.
    assert found["safetensors"]["heat_seconds"] == []
    assert f"dropped after the heats: {dropped['loader']} (" in measured[1]
    assert measured[0]["seed"] == 7


def test_the_fastest_setting_of_direct_reads_is_the_limit(measured: tuple[dict[str, Any], str, Path]) -> None:
    for kind in ("mapped", "private"):
        direct = [x for x in scenario(measured[0], "cold", kind)["limits"] if x["limit"].startswith("direct read, ")]
        assert len({x["limit"] for x in direct}) == len(direct) > 2
        assert all(x["held_against"] for x in direct)
        if any(x["reason"] for x in direct):  # this file system has none
            continue
        assert [len(x["heat_seconds"]) for x in direct] == [1] * len(direct)
        best = min(direct, key=lambda x: float(x["heat_seconds"][0]))
        assert [x["limit"] for x in direct if not x["dropped_after_heats"]] == [best["limit"]]
        assert len(best["seconds"]) == 2
        assert "threads of " in best["limit"]


def test_memory_is_what_a_loader_has_beyond_the_page_cache(measured: tuple[dict[str, Any], str, Path]) -> None:
    result = measured[0]
    private = rows_of(scenario(result, "warm", "private"))
    for name in ("safetensors clone", "weightload pread", "right"):
        # The kernel counts by and by, and small tensors find room that the process had.
        assert 0.7 * result["bytes"] <= private[name]["private_peak_bytes"] < 20 * result["bytes"]
        assert private[name]["kept_bytes"] is not None
    for name, row in rows_of(scenario(result, "warm", "into")).items():
        assert row["private_peak_bytes"] < 40 << 20, name  # the parameters were there before


MEMORY_LOADERS = """
import torch
from safetensors import safe_open

def small(files, device):
    with safe_open(files[0], framework="pt", device="cpu") as opened:
        for name in opened.keys():
            yield name, opened.get_tensor(name).clone()

def comparing_is_dear(files, device):
    from checkpoints import expected
    difference = expected.Checkpoint.differs
    def differs(*args, **options):
        torch.ones(256 << 20, dtype=torch.uint8)
        return difference(*args, **options)
    expected.Checkpoint.differs = differs
    return small(files, device)
"""


def test_comparing_does_not_count_as_memory(tmp_path: Path) -> None:
    """Neither what the check needs, nor anything before or after the load."""
    from harness.compare_run import Arm

    file = write_tensors(tmp_path / "a.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(4)])
    (tmp_path / "own.py").write_text(MEMORY_LOADERS)
    with (tmp_path / "log").open("wb") as log:
        arm = Arm(f"{tmp_path}/own.py:comparing_is_dear", [str(file)], torch.device("cpu"), log, 60)
        arm.start()
        arm.ready()
        arm.check()
        arm.close()
    assert (arm.facts["reason"], arm.facts["wrong"]) == (None, None)
    assert 4 << 20 <= arm.facts["private_peak_bytes"] < 64 << 20


ONE_WRONG = """
import torch
from safetensors import safe_open

def one_wrong(files, device):
    with safe_open(files[0], framework="pt", device="cpu") as opened:
        for name in opened.keys():
            tensor = opened.get_tensor(name).clone()
            if name == "WRONG":
                tensor[100_000] += 1
            yield name, tensor.to(device)
"""
CHECK = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from loaders.worker import Runner
from loaders.peers import find
if sys.argv[3] != "cpu":
    import simulated_accelerator
    native = simulated_accelerator.load()
    native.set_available(True)
    native.seed_delays(0, 0)
found = Runner(find(sys.argv[4]), [sys.argv[5]], torch.device(sys.argv[3])).load(thorough=True)
print(found["wrong"])
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("simulated:0", marks=pytest.mark.simulated)])
def test_every_tensor_is_compared_on_every_device(tmp_path: Path, device: str) -> None:
    """One wrong byte in the middle of a tensor that is not in the sample."""
    from checkpoints.expected import Checkpoint

    if device != "cpu":
        import simulated_accelerator

        simulated_accelerator.load()  # builds it, which the process below has no time for
    file = str(write_tensors(tmp_path / "a.safetensors", [(f"{i:03}", "U8", [200_000]) for i in range(120)]))
    wrong = next(name for name in sorted(Checkpoint([file]).file_of) if name not in Checkpoint([file]).sample)
    (tmp_path / "own.py").write_text(ONE_WRONG.replace("WRONG", wrong))
    paths = [TESTS, BENCHMARKS]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *map(str, paths), device, f"{tmp_path}/own.py:one_wrong", file],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == f"{wrong}: bytes differ, from 0 on", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("loader", "wrong"),
    [
        ("one_bit_wrong", "last: bytes differ"),
        ("too_early", "as it was yielded: "),
        ("memory_used_again", "bytes differ"),
        ("one_missing", "1 names are missing"),
    ],
)
def test_wrong_bytes_are_reported_and_have_no_time(
    measured: tuple[dict[str, Any], str, Path], loader: str, wrong: str
) -> None:
    result, out, folder = measured
    for cache in ("warm", "cold"):
        row = rows_of(scenario(result, cache, "private"))[loader]
        assert wrong in row["wrong"]
        assert (row["seconds"], row["median_s"]) == ([], None)
    assert f"WRONG: {row['wrong']}" in out
    assert f"WRONG: {row['wrong']}" in run("report/results.py", folder / "r.json")


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ("crashes", "SIGABRT"),
        ("hangs", "no answer within 15 s"),
        ("raises", "OSError: [Errno 5] broken disk"),
        ("not_private", "views of the files"),
        ("instanttensor", "only for CUDA devices"),
        ("safetensors 0.9", "not installed in safetensors-rc"),
    ],
)
def test_a_loader_that_fails_or_is_missing_says_why(
    measured: tuple[dict[str, Any], str, Path], loader: str, reason: str
) -> None:
    result, out, folder = measured
    facts = {name.split(":")[-1]: facts for name, facts in result["loaders"].items()}
    assert reason in facts[loader]["reason"]
    assert facts[loader]["wrong"] is None
    assert f"skipped: {facts[loader]['reason']}" in out
    assert facts[loader]["reason"] in run("report/results.py", folder / "r.json")


def test_what_a_loader_tells_of_its_load_is_kept(measured: tuple[dict[str, Any], str, Path]) -> None:
    found = rows_of(scenario(measured[0], "warm", "private"))
    assert found["right"]["stats"]["bottleneck"] == "read"
    assert found["safetensors clone"]["stats"] is None


def test_tables_and_pictures_are_made_of_the_results(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, _, folder = measured
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    for found in result["scenarios"]:
        for row in found["rows"]:
            if row["loader"] == "weightload pread":
                row["stats"] = {"seconds": 1.0, "stages": {"read": {"seconds": 0.5, "bytes": 1}}}
    (folder / "s.json").write_text(json.dumps(result))
    pictures = [folder / f"{name}.png" for name in ("plot", "plot-all", "memory", "stages")]
    options = [text for picture in pictures for text in (f"--{picture.stem}", picture)]
    table = run("report/results.py", *options, folder / "s.json", folder / "r.json")
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert table.count("**tiny: 0.00 GB, 18 tensors, 2 file(s)**") == 2
    assert "| *limit: parallel read into new memory* |" in table
    assert "| safetensors clone 0." in table


@pytest.mark.alone
def test_tensors_in_memory_files_are_compared_too(checkpoint: Path, tmp_path: Path) -> None:
    from harness.proc import file_system

    if file_system("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is not a tmpfs")
    before = sorted(os.listdir("/dev/shm"))
    loaders = "safetensors,weightload,safetensors clone,weightload pread"
    run(
        "compare_loaders.py", "--model-path", checkpoint, "--repeats", 1, "--fresh", 0, "--tmpfs", "--loaders", loaders,
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    found = [s for s in json.loads((tmp_path / "r.json").read_text())["scenarios"] if s["place"] == "tmpfs"]
    assert [s["kind"] for s in found] == ["mapped", "private"]
    for each in found:
        if each["reason"]:  # little memory
            continue
        assert [len(row["seconds"]) for row in each["rows"]] == [1, 1]
    assert set(os.listdir("/dev/shm")) <= set(before)  # others may have files there, too


def test_loads_by_two_ranks_are_in_the_same_table(checkpoint: Path, tmp_path: Path) -> None:
    # An index that names one of the folder's files.
    names = ["scalar", "last"]
    index = checkpoint / "part" / "model.safetensors.index.json"
    index.parent.mkdir()
    for file in checkpoint.glob("*.safetensors"):
        (index.parent / file.name).hardlink_to(file)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "b.safetensors")}))
    out = run(
        "compare_loaders.py", "--model-path", checkpoint, "--subfolder", "part", "--seed", 3, "--ranks", 2,
        "--repeats", 1, "--json", tmp_path / "r.json", "--loaders", "weightload", WEIGHTLOAD_PEERS=str(tmp_path),
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    mapped, private = result["scenarios"]
    assert [s["ranks"] for s in (mapped, private)] == [2, 2]
    assert (result["files"], result["tensors"], result["bytes"]) == (1, 2, 1_000_004)
    assert {"python mapped", "weightload independent", "weightload auto"} == set(rows_of(mapped))
    rows = rows_of(private)
    assert {"python broadcast", "weightload striped", "weightload broadcast"} <= set(rows)
    for name in ("fastsafetensors broadcast", "run:ai distributed"):
        assert rows[name]["seconds"] or "not installed" in rows[name]["reason"]
    assert rows["weightload striped"]["of_limit"] > 0
    assert rows["python broadcast"]["speedup"] == pytest.approx(1)
    assert "private memory, 2 ranks" in out
    assert "skipped: fastsafetensors is not installed" in out or rows["fastsafetensors broadcast"]["seconds"]


def test_ranks_that_load_other_files_are_not_compared(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from harness import compare_ranks

    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "given = dict(zip(sys.argv[1:], sys.argv[2:]))\n"
        "assert given['--model-path'] == 'the/path' and given['--subfolder'] == 'below'\n"
        "result = {'ranks': 1, 'files': 1, 'tensors': 2, 'bytes': 3, 'rows': [], 'dropped': {}}\n"
        "json.dump(result, open(given['--json'], 'w'))\n"
    )
    monkeypatch.setattr(compare_ranks, "SCRIPT", script)
    options = argparse.Namespace(
        device=torch.device("cpu"), model_path="the/path", subfolder="below", warmup=0, repeats=1, seed=1, budget=1
    )
    with (tmp_path / "log").open("wb") as log:
        assert compare_ranks.run((1, 2, 3), 1, options, log)["rows"] == []
        other = compare_ranks.run((1, 2, 4), 1, options, log)
    assert other["reason"] == "(files, tensors, bytes) were (1, 2, 3) there, and (1, 2, 4) here"
    assert compare_ranks.scenarios(other, options.device)[0]["reason"] == other["reason"]


def test_where_tensors_are() -> None:
    from harness import tensor_memory

    whole = torch.zeros(4096 * 6, dtype=torch.uint8)
    parts = {"a": whole[:5000], "b": whole[5000:9000], "empty": whole[:0], "c": whole[16384:16400]}
    spans = tensor_memory.spans_of(parts.values())
    tensor_memory.touch(spans)
    assert all(begin % 4096 == end % 4096 == 0 for begin, end in spans)
    for tensor in (parts["a"], parts["b"], parts["c"]):
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(begin <= first and last <= end for begin, end in spans)
    assert tensor_memory.overlapping(parts) is None
    assert tensor_memory.overlapping({**parts, "d": whole[4999:5001]}) in (("a", "d"), ("d", "b"))


def test_the_limits_of_memory_read_all_bytes(checkpoint: Path) -> None:
    from harness import host_limits

    files = sorted(map(str, checkpoint.glob("*.safetensors")))
    expected = b"".join(Path(file).read_bytes() for file in files)
    with host_limits._new_memory(files) as memory:
        host_limits._read_into(files, memory)
        assert memory[:] == expected
    assert host_limits.read_into_new_memory(files) > 0
    assert host_limits.read_into_touched_memory(files) > 0
    with contextlib.suppress(OSError):  # an old kernel
        assert host_limits.map_in_parallel(files) > 0
