"""Builds the torch-free core with plain g++ and runs its C++ tests: as it is, and under the sanitizers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = ROOT / ".build" / "cpp"
TESTS = sorted(path.stem for path in (ROOT / "tests" / "cpp").glob("test_*.cpp"))
CORE = sorted(
    path
    for room in ("base", "format", "plan", "io", "memory", "pipeline")
    for path in (ROOT / "csrc" / room).glob("*.cpp")
)

# C++17, the oldest that a supported torch compiles extensions with.
FLAGS = "-std=c++17 -Wall -Wextra -Wpedantic -Wconversion -Werror -pthread"
FLAVOURS = {
    "plain": "-O2",
    "address": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -g -fsanitize=thread",
}


def write_ninja(flavour: str) -> Path:
    """One build file a flavour; ninja then rebuilds only what changed."""
    json_spec = importlib.util.find_spec("nlohmann_json")
    assert json_spec is not None
    assert json_spec.submodule_search_locations
    include = f"-I{ROOT}/csrc -I{ROOT}/tests/cpp -isystem {json_spec.submodule_search_locations[0]}/include"
    folder = BUILD / flavour
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"flags = {FLAGS} {FLAVOURS[flavour]} {include}",
        "rule compile\n  command = g++ $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = g++ $flags $in -o $out",
    ]
    objects = []
    for source in CORE:
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    for name in TESTS:
        lines.append(f"build {name}.o: compile {ROOT}/tests/cpp/{name}.cpp")
        lines.append(f"build {name}: link {name}.o {' '.join(objects)}")
    text = "\n".join(lines) + "\n"
    build_file = folder / "build.ninja"
    if not build_file.exists() or build_file.read_text() != text:
        build_file.write_text(text)
    return folder


@pytest.fixture(scope="module", params=FLAVOURS)
def programs(request: pytest.FixtureRequest) -> Path:
    folder = write_ninja(request.param)
    build = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-4000:]
    return folder


@pytest.mark.parametrize("name", TESTS)
def test_core(programs: Path, name: str) -> None:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "allocator_may_return_null=1",
    }
    run = subprocess.run([str(programs / name)], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    assert "tests passed" in run.stdout
