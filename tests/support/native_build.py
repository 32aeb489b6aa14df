"""Builds programs of the core without torch, with ninja: what has changed, and each object once for all programs."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / ".build"

# C++17, the oldest that a supported torch compiles extensions with.
FLAGS = "-std=c++17 -Wall -Wextra -Wpedantic -Wconversion -Werror -pthread"
# Assertions: an index beyond the end of a vector is an error even where the memory behind it is the vector's own.
CHECKED = "-g -D_GLIBCXX_ASSERTIONS -fno-omit-frame-pointer -fno-sanitize-recover=all"

# Compiled in a third of the time that optimized code takes, and checked no less.
ADDRESS = f"-O0 {CHECKED} -fsanitize=address,undefined"


def build(
    folder: Path,
    programs: Mapping[Path, Sequence[Path]],
    flags: str,
    compiler: str = "g++",
    compile_flags: str = "",
    link_flags: str = "",
) -> None:
    """Build programs from their sources, with the objects in ``folder``, where all are compiled by one command.

    Raises:
        RuntimeError: what ninja said.
    """
    json_spec = importlib.util.find_spec("nlohmann_json")
    assert json_spec is not None
    assert json_spec.submodule_search_locations
    include = f"-I{ROOT}/csrc -I{ROOT}/tests/cpp -isystem {json_spec.submodule_search_locations[0]}/include"
    lines = [
        f"flags = {FLAGS} {flags} {include}",
        f"rule compile\n  command = {compiler} $flags {compile_flags} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} $flags {link_flags} $in -o $out",
    ]
    objects = {source: f"{source.parent.name}_{source.stem}.o" for sources in programs.values() for source in sources}
    lines += [f"build {out}: compile {source}" for source, out in objects.items()]
    for program, sources in programs.items():
        program.parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"build {program}: link {' '.join(objects[source] for source in sources)}")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{next(iter(programs)).stem}.ninja"
    (folder / name).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-f", name]
    with (folder / "lock").open("w") as lock:  # ninja's log of the folder is one process's at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:])
