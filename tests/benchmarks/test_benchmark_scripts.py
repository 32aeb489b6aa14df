"""The two benchmark scripts to the person who calls them: wrong arguments, progress, width; and their functions."""

from __future__ import annotations

import importlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TESTS, write_tensors

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("benchmark_weight_loading", "benchmark_weight_loading_comparison")
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts") / "model"
    folder.mkdir()
    odd = [("empty", "F32", [0, 3]), ("scalar", "I16", []), ("float8", "F8_E4M3", [5, 7])]
    write_tensors(folder / "a.safetensors", [*odd, *((f"a.{i}", "BF16", [i + 1, 100]) for i in range(8))], seed=1)
    write_tensors(folder / "b.safetensors", [("large", "F32", [300, 1000])], seed=2)
    return folder


def call(script: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Its exit code, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


WRONG: dict[str, tuple[list[str], str]] = {
    "no such path": (["--model-path", "MODEL/none"], "MODEL/none"),
    "a name of two lines": (["--model-path", "MODEL/no\nne"], "no\\nne"),
    "no safetensors file": (["--model-path", "MODEL/.."], "No safetensors files"),
    "no such folder": (["--model-path", "MODEL", "--subfolder", "none"], "none"),
    "another kind of file": (["--model-path", __file__], "header too large"),
    "no tensors": (["--model-path", "MODEL/a.safetensors/../../empty.safetensors"], "no tensor"),
    "no path": ([], "--model-path"),
    "unknown flag": (["--model-path", "MODEL", "--bogus"], "--bogus"),
    "no number": (["--model-path", "MODEL", "--warmup", "x"], "--warmup: 'x'"),
    "a negative number": (["--model-path", "MODEL", "--warmup=-1"], "--warmup: '-1'"),
    "no rounds": (["--model-path", "MODEL", "--repeats", "0"], "--repeats: '0'"),
    "no such device": (["--model-path", "MODEL", "--device", "nonsense"], "no such device"),
    "a device that is not here": (["--model-path", "MODEL", "--device", "xpu:0"], "cannot load to xpu:0"),
    "a result that cannot be written": (["--model-path", "MODEL", "--json", "MODEL"], "cannot be written"),
    "a folder that is a file": (["--model-path", "MODEL", "--json", "MODEL/a.safetensors/r.json"], "a.safetensors"),
    "no picture": (["--model-path", "MODEL", "--plot", "MODEL/x.foo"], "no format of pictures"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_wrong_is_told_in_a_line(
    script: str, wrong: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, said = WRONG[wrong]
    if wrong == "no tensors":
        arguments = ["--model-path", str(write_tensors(checkpoint.parent / "empty.file", [("w", "F32", [0])]))]
    arguments = [argument.replace("MODEL", str(checkpoint)) for argument in arguments]
    assert call(script, *arguments, monkeypatch=monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{script}.py: ")
    assert said.replace("MODEL", str(checkpoint)) in line
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_setting_that_is_wrong_is_told_in_a_line(
    script: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "many")
    assert call(script, "--model-path", checkpoint, monkeypatch=monkeypatch) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "WEIGHTLOAD_THREADS='many'" in line


@pytest.mark.parametrize(
    ("script", "arguments"),
    [(SCRIPTS[0], ["--model-path", "/none"]), (SCRIPTS[1], ["--model-path", "/none", "--backend", "foo"])],
)
def test_a_process_tells_it_in_a_line(script: str, arguments: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def torchrun(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ranks_tell_it_once_and_end_together(script: str, tmp_path: Path) -> None:
    done = torchrun(BENCHMARKS / f"{script}.py", "--model-path", tmp_path / "none")
    assert done.returncode != 0
    assert done.stderr.count(f"{script}.py: [Errno 2] No such file or directory: '{tmp_path}/none'\n") == 1
    assert f'{script}.py", line' not in done.stderr  # the launcher's own traceback only


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_measured_and_how_far_it_is(script: str, checkpoint: Path, tmp_path: Path) -> None:
    """A bar on a terminal, lines elsewhere; the table on stdout, no wider than 100 characters."""
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--model-path", str(checkpoint), "--repeats", "2"]
    command += ["--device", "cpu", "--title", "A checkpoint with a long name " * 5]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    first, *steps = done.stderr.splitlines()
    assert "12 tensors, 2 file(s); to cpu, by 1 rank(s)" in first
    said = list(dict.fromkeys(line.split(": ")[0] for line in steps))  # where it is slow, more than once
    assert said == [f"{i + 1} of {len(said)}" for i in range(len(said))]
    assert any("warm page cache" in line for line in steps)

    script_text = f"""
import runpy, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from weightload._load import progress
progress.SECONDS_BEFORE_THE_BAR = 0
sys.argv[0] = {script!r}
runpy.run_path({str(BENCHMARKS / script)!r} + ".py", run_name="__main__")
"""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script_text, *command[2:]], stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as running:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # Linux's end of a terminal
            pass
        os.close(ours)
        assert running.stdout
        assert "GB/s" in running.stdout.read()
    assert running.returncode == 0
    assert b"warm page cache" in shown
    assert b"100%|" in shown
    assert b"loads/s" in shown


def test_lines_where_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from harness import command_line

    steps = command_line.Steps(2)
    with steps.next("quick", 2) as advance:
        advance(1)
        advance(1)
    monkeypatch.setattr(command_line, "SECONDS_BETWEEN_LINES", 0)
    with steps.next("slow", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 2: quick, 2 loads",
        "2 of 2: slow, 3 loads",
        "2 of 2: slow, 1 of 3 loads done",
        "2 of 2: slow, 2 of 3 loads done",
    ]
    monkeypatch.setenv("RANK", "1")
    with command_line.Steps(1).next("another rank", 1) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["cpu-llama", "cpu-small", "ranks-llama", "ranks-small"])
def test_tables_of_real_results_fit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from report import group_report
    from report import results as report

    result = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    (report if name.startswith("cpu") else group_report).print_table(result)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_a_file_that_cannot_be_evicted_and_ctrl_c_are_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from harness import command_line
    from harness.machine import NotEvictedError

    def never_cold() -> None:
        raise NotEvictedError("30% of the files is still in the page cache")

    def pressed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=": 30% of the files"):
        command_line.run(never_cold)
    with pytest.raises(SystemExit) as ended:
        command_line.run(pressed)
    assert (ended.value.code, capsys.readouterr().err) == (130, "stopped\n")


def same(found: Any, files: list[str]) -> bool:
    expected = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    found = dict(found)
    return found.keys() == expected.keys() and all(
        torch.equal(tensor.reshape(-1).view(torch.uint8), found[name].reshape(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


def test_functions_for_programs_that_import_them(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmark_weight_loading import benchmark_loading
    from benchmark_weight_loading_comparison import load_broadcast, load_independent

    files = sorted(map(str, checkpoint.glob("*.safetensors")))
    seconds = benchmark_loading(files, to_cpu=True, broadcast=False, warmup=1, repeats=3, label="to the CPU")
    assert len(seconds) == 3
    assert min(seconds) > 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("to the CPU: 12 tensors, 0.00 GB; average ")
    assert line.endswith("(3 loads after 1 others)")
    assert same(load_independent(files, "cpu"), files)
    assert same(load_broadcast(files, torch.device("cpu"), None), files)


def test_functions_on_two_ranks(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "calls.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(TESTS)!r}]
from types import SimpleNamespace

import torch.distributed as dist
from benchmark_weight_loading import benchmark_loading
from benchmark_weight_loading_comparison import load_broadcast, load_independent
from benchmarks.test_benchmark_scripts import same
dist.init_process_group("gloo")
files = sys.argv[1:]
benchmark_loading(files, True, True, 0, 2, "CPU")
assert same(load_independent(files, "cpu"), files)
for group in (None, dist.group.WORLD, SimpleNamespace(device_group=dist.group.WORLD)):
    for async_op in (False, True):
        assert same(load_broadcast(files, "cpu", group, async_op=async_op), files)
del group  # see Ranks.close
dist.destroy_process_group()
"""
    )
    done = torchrun(script, *sorted(checkpoint.glob("*.safetensors")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CPU: 12 tensors") == 1  # the first rank speaks
