"""Builds the fuzz target: with libFuzzer where there is a clang, and with a plain driver and g++."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
BUILD = ROOT / ".build" / "fuzz"
SEEDS = FOLDER / "corpus"
DICTIONARY = FOLDER / "tokens.dict"
ENGINES = ("libfuzzer", "standalone")

SOURCES = sorted(
    [path for room in ("base", "format", "plan", "io", "memory") for path in (ROOT / "csrc" / room).glob("*.cpp")]
    + [ROOT / "csrc" / "pipeline" / "checkpoint_file.cpp"]
    + [path for path in FOLDER.glob("*.cpp") if path.stem != "driver"]
)
# Assertions: an index beyond the end of a vector is an error even where the memory behind it is the vector's own.
FLAGS = (
    "-std=c++17 -Wall -Wextra -Wpedantic -Wconversion -Werror -pthread -O1 -g -D_GLIBCXX_ASSERTIONS"
    " -fno-omit-frame-pointer -fno-sanitize-recover=all"
)


@functools.cache
def clang() -> str | None:
    """A clang++ that can link libFuzzer, by its name; newer ones first."""
    names = [os.environ.get("WEIGHTLOAD_CLANG", ""), "clang++", *(f"clang++-{number}" for number in range(24, 11, -1))]
    program = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    for name in filter(shutil.which, names):
        command = [name, "-fsanitize=fuzzer,address,undefined", "-xc++", "-", "-o", os.devnull]
        if subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0:
            return name
    return None


def compilers(engine: str) -> tuple[str, str, str]:
    """The compiler, what its objects are compiled with, and what the program is linked with."""
    if engine == "standalone":
        return "g++", "-fsanitize=address,undefined", "-fsanitize=address,undefined"
    compiler = clang()
    assert compiler is not None, "there is no clang with libFuzzer"
    return compiler, "-fsanitize=fuzzer-no-link,address,undefined", "-fsanitize=fuzzer,address,undefined"


def build(engine: str) -> Path:
    """Compile what has changed; the program's path."""
    compiler, compile_flags, link_flags = compilers(engine)
    json_spec = importlib.util.find_spec("nlohmann_json")
    assert json_spec is not None
    assert json_spec.submodule_search_locations
    include = f"-I{ROOT}/csrc -I{FOLDER} -isystem {json_spec.submodule_search_locations[0]}/include"
    folder = BUILD / engine
    folder.mkdir(parents=True, exist_ok=True)
    sources = SOURCES + ([FOLDER / "driver.cpp"] if engine == "standalone" else [])
    lines = [
        f"flags = {FLAGS} {include}",
        f"rule compile\n  command = {compiler} $flags {compile_flags} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} $flags {link_flags} $in -o $out",
    ]
    objects = [f"{source.parent.name}_{source.stem}.o" for source in sources]
    lines += [f"build {out}: compile {source}" for out, source in zip(objects, sources, strict=True)]
    lines.append(f"build fuzz_checkpoint: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:])
    return folder / "fuzz_checkpoint"
