"""Fuzzes the header parser and the plans briefly, with libFuzzer and with its stand-in; `make fuzz` is long."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fuzz import build, run, seeds, verdicts


@pytest.fixture(scope="module", params=build.ENGINES)
def program(request: pytest.FixtureRequest) -> Path:
    if request.param == "libfuzzer" and build.clang() is None:
        pytest.skip("there is no clang with libFuzzer; the standalone engine runs the same target")
    return build.build(request.param)


def fuzz(program: Path, crashes: Path, *arguments: object) -> int:
    # Started by a shell: what these tests have had of memory would count as the program's, which has a limit.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *run.command(program, crashes), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    kept = [str(path) for path in crashes.iterdir()]
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-4000:]}\n{kept}"
    return run.executions(done.stdout + done.stderr)


def test_the_seeds_are_what_the_script_writes() -> None:
    """`python tests/fuzz/seeds.py` after a change of the rules' tests."""
    assert {path.name: path.read_bytes() for path in build.SEEDS.iterdir()} == seeds.all_seeds()


def test_the_seeds_are_refused_for_the_rule_they_are_named_for() -> None:
    for path in build.SEEDS.glob("refused-*"):
        assert path.name.endswith(type(verdicts.ours(path.read_bytes()[seeds.CHOICES_BYTES :])).__name__)
    for path in build.SEEDS.glob("accepted-*"):
        assert isinstance(verdicts.ours(path.read_bytes()[seeds.CHOICES_BYTES :]), dict)


def test_the_seeds_get_the_verdict_of_safetensors() -> None:
    assert run.disagreements(build.SEEDS) == []


def test_replay(program: Path, tmp_path: Path) -> None:
    assert fuzz(program, tmp_path / "crashes", "-runs=0", build.SEEDS) >= len(list(build.SEEDS.iterdir()))


def test_a_short_run(program: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    done = fuzz(program, tmp_path / "crashes", "-runs=8000", "-seed=1", tmp_path / "corpus", build.SEEDS)
    assert done >= 8000
