"""Builds weightload's C++ extension against the torch that is installed in the target environment."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
OLDEST_TORCH = (2, 8)
PARSER = "csrc/format/header_json.cpp"
BINDINGS = "csrc/bindings/"
WITH_TORCH = ("csrc/device/accelerator.cpp", "csrc/device/plain_torch.cpp", "csrc/group/process_group.cpp")
INSTALL_TORCH = "pip install 'torch>=2.8'"


def stop(sentence: str) -> None:
    raise SystemExit(f"\nweightload: {sentence}\n")


def find_torch() -> None:
    """Make the target environment's torch importable.

    Under pip's build isolation the interpreter is the target's but its site-packages are hidden: pip sets PYTHONPATH
    to a private directory whose sitecustomize removes them. The same interpreter started without these variables
    sees what the target environment sees, whatever kind of environment it is.
    """
    if importlib.util.find_spec("torch") is not None:
        return
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    probe = (
        "import importlib.util as u, sys; s = u.find_spec('torch'); "
        "print('\\n'.join(sys.path) if s and s.origin else '')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", probe], env=environment, cwd="/", capture_output=True, text=True, check=False
    ).stdout.split("\n")
    # Behind everything the build environment has, so that its setuptools and ninja stay in front.
    sys.path.extend(entry for entry in answer if entry and entry not in sys.path)
    importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        stop(
            "it is compiled against the torch of the environment it is installed into, and there is none; "
            f"run: {INSTALL_TORCH}, then install weightload again"
        )


find_torch()
import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths  # noqa: E402

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    stop(f"torch {torch.__version__} is installed, and 2.8 is the oldest supported; run: {INSTALL_TORCH}")


if not Path(sysconfig.get_path("include"), "Python.h").exists():
    stop("Python's headers are missing; run: apt-get install python3-dev (or your system's package of that kind)")


def json_include() -> str:
    """The directory of nlohmann/json.hpp, from the nlohmann-json package."""
    spec = importlib.util.find_spec("nlohmann_json")
    if spec is None or not spec.submodule_search_locations:
        stop("nlohmann-json's headers are missing; run: pip install nlohmann-json")
        raise AssertionError
    return str(Path(spec.submodule_search_locations[0]) / "include")


def joined(sources: list[str], folder: Path) -> list[str]:
    """Three files that include all others: one by one, most of the time would go into torch's headers.

    Two processors need as long for the first as for the other two.
    """
    parts: dict[str, list[str]] = {"bindings": [], "torch": [], "rest": []}
    for source in sources:
        name = "bindings" if source.startswith(BINDINGS) else "torch" if source in WITH_TORCH else "rest"
        parts[name].append(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in parts.items():
        text = "".join(f'#include "{source.removeprefix("csrc/")}"\n' for source in members)
        path = folder / f"{name}.cpp"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return [str(folder / f"{name}.cpp") for name in parts]


class BuildAgainstTorch(BuildExtension):
    """Compiles the JSON parser in C++17, and records which torch the extension is compiled against, for the import."""

    def run(self) -> None:
        super().run()
        package = ROOT / "weightload" if self.inplace else Path(self.build_lib) / "weightload"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(
            f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
        )

    def build_extension(self, ext: Extension) -> None:
        # torch may ask for C++20, in which libstdc++'s string and vector are too large for g++ to inline into the
        # parser's loops: headers then take 1.4 times as long to parse.
        flags = [*ext.extra_compile_args["cxx"], "-std=c++17"]
        parser = self.compiler.compile(
            [PARSER],
            output_dir=str(Path(self.build_temp, "parser")),
            include_dirs=ext.include_dirs,
            debug=self.debug,
            extra_postargs={"cxx": flags},
            depends=ext.depends,
        )
        rest = copy.copy(ext)
        rest.sources = joined([source for source in ext.sources if source != PARSER], Path(self.build_temp, "joined"))
        rest.extra_objects = [*ext.extra_objects, *parser]
        rest.depends = [*ext.depends, PARSER]  # so that a change of it is linked, too
        super().build_extension(rest)


def extension() -> Extension:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    flags = ["-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if os.environ.get("WEIGHTLOAD_WERROR") == "1":
        # -isystem: warnings of other people's headers are not ours to mend.
        flags += ["-Werror", "-Wpedantic", "-Wconversion"]
        flags += [f"-isystem{path}" for path in [*include_paths(), json_include()]]
    made: Extension = CppExtension(  # type: ignore[no-untyped-call]
        "weightload._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), json_include()],
        extra_compile_args={"cxx": flags},
    )
    return made


def label() -> str:
    """What a wheel's version ends in, so that one for this torch is not taken for one for another (`make wheel`)."""
    if os.environ.get("WEIGHTLOAD_WHEEL") != "1":
        return ""
    return "+torch" + torch.__version__.replace("+", ".")


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildAgainstTorch},
    options={"egg_info": {"tag_build": label()}},
)
