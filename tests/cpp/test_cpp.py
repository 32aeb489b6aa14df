"""Builds the torch-free core with plain g++ and runs its C++ tests: as it is, and under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import check_imports
import pytest
from support import native_build
from support.native_build import BUILD, ROOT

TESTS = sorted((ROOT / "tests" / "cpp").glob("test_*.cpp"))
CORE = sorted(
    path
    for room in check_imports.ROOMS[: check_imports.ROOMS.index("bindings")]
    for path in (ROOT / "csrc" / room).glob("*.cpp")
    if str(path.relative_to(ROOT / "csrc")) not in check_imports.NEED_TORCH
)
FLAVOURS = {
    "plain": "-O2",
    "address": native_build.ADDRESS,
    "thread": "-O1 -g -fsanitize=thread",
}


@pytest.fixture(scope="module", params=FLAVOURS)
def programs(request: pytest.FixtureRequest) -> Path:
    folder = BUILD / "cpp" / request.param
    native_build.build(folder, {folder / test.stem: [test, *CORE] for test in TESTS}, FLAVOURS[request.param])
    return folder


@pytest.mark.parametrize("name", [test.stem for test in TESTS])
def test_core(programs: Path, name: str) -> None:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1:handle_sigbus=0",
        "ASAN_OPTIONS": "allocator_may_return_null=1:handle_sigbus=0",
    }
    run = subprocess.run([str(programs / name)], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    assert "tests passed" in run.stdout
