"""Builds the fuzz target: with libFuzzer where there is a clang, and with a plain driver and g++."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

from support import native_build
from support.native_build import ADDRESS, CHECKED, ROOT

FOLDER = Path(__file__).parent
BUILD = native_build.BUILD / "fuzz"
SEEDS = FOLDER / "corpus"
DICTIONARY = FOLDER / "tokens.dict"
ENGINES = ("libfuzzer", "standalone")

SOURCES = sorted(
    [
        path
        for room in ("base", "threads", "format", "plan", "memory", "file", "page_cache")
        for path in (ROOT / "csrc" / room).glob("*.cpp")
    ]
    + [ROOT / "csrc" / "checkpoint" / "checkpoint_file.cpp"]
    + [path for path in FOLDER.glob("*.cpp") if path.stem != "driver"]
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


def build(engine: str) -> Path:
    """Compile what has changed; the program's path."""
    program = BUILD / engine / "fuzz_checkpoint"
    if engine == "standalone":  # the core's objects are those of the C++ tests
        folder, sources = native_build.BUILD / "cpp" / "address", [*SOURCES, FOLDER / "driver.cpp"]
        native_build.build(folder, {program: sources}, ADDRESS)
        return program
    compiler = clang()
    assert compiler is not None, "there is no clang with libFuzzer"
    sanitizers = "-fsanitize=fuzzer-no-link,address,undefined", "-fsanitize=fuzzer,address,undefined"
    native_build.build(program.parent, {program: SOURCES}, f"-O1 {CHECKED}", compiler, *sanitizers)
    return program
