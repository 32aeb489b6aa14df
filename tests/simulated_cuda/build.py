"""Builds the simulated CUDA with ninja, against the headers and the symbols of the real libraries in an environment.

Whatever the real libraries export and ours do not define becomes a stub, which says its name and fails.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = "-std=c++17 -O2 -g1 -fPIC -pthread -Wall -Wextra -Werror"
# nccl.h includes headers of numbers that need compiler headers nobody installs, and uses none of them.
NO_NUMBERS = "-D__CUDA_FP16_H__ -D__CUDA_BF16_H__ -D__CUDA_FP8_H__"
REAL = ".real"  # what the real library beside its link is called


class Libraries:
    """Where an environment keeps what is built against and what is replaced."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self.cuda = site / "nvidia" / "cu13"
        self.nccl = site / "nvidia" / "nccl"
        self.torch = site / "torch"

    def real(self, name: str) -> Path:
        """The real library, whether or not it was replaced already."""
        folder = (self.nccl if "nccl" in name else self.cuda) / "lib"
        aside = folder / (name + REAL)
        return aside if aside.exists() else folder / name


def exported(library: Path) -> set[str]:
    """The functions that a library exports."""
    text = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in text.splitlines() if line.split()[-2] in "TWi"}
    return {name for name in names if re.fullmatch(r"_*p?(cuda|cu|nccl)[A-Za-z0-9_]*", name)}


def defined(sources: list[Path]) -> set[str]:
    """The functions of CUDA and NCCL that sources define: they begin a line with their type."""
    pattern = re.compile(
        r"^(?:cudaError_t|const char\*|CUresult|ncclResult_t|unsigned|char|void|void\*\*) (_*(?:cu|nccl)\w+)\(", re.M
    )
    found = {name for path in sources for name in pattern.findall(path.read_text())}
    # The newest form of a call has a number in its name, which its header puts there.
    return found | {f"{name}_v2" for name in found if name.startswith("cu") and not name.startswith("cuda")}


def stubs(names: set[str], error: int) -> str:
    """A function for each name that says it and returns the error."""
    lines = ["int simulated_cuda_unprovided(const char* name);"]
    lines += [f'int {name}(void) {{ simulated_cuda_unprovided("{name}"); return {error}; }}' for name in sorted(names)]
    return "\n".join(lines) + "\n"


def driver_names(libraries: Libraries) -> set[str]:
    """The driver has no library in the environment, only a header."""
    text = (libraries.cuda / "include" / "cuda.h").read_text(errors="replace")
    return set(re.findall(r"CUDAAPI (cu[A-Z]\w+)\(", text))


def write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(site: Path, out: Path) -> None:
    """Build the libraries of an environment's site-packages into a folder.

    Raises:
        RuntimeError: what ninja said.
    """
    libraries = Libraries(site)
    parts = {name: sorted((HERE / name).glob("*.cpp")) for name in ("runtime", "driver", "nvml", "nccl", "operators")}
    real = {"runtime": "libcudart.so.13", "nccl": "libnccl.so.2"}
    for part, library in real.items():
        missing = exported(libraries.real(library)) - defined(parts[part])
        write(out / f"{part}_stubs.c", stubs(missing, 801 if part == "runtime" else 3))
    write(out / "driver_stubs.c", stubs(driver_names(libraries) - defined(parts["driver"]), 801))
    # torch asks for the runtime's symbols by this version, and for NCCL's without one.
    names = "cuda*; __cuda*; simulated_cuda_*;"
    write(out / "runtime.map", f"libcudart.so.13 {{ global: {names} local: *; }};\n")
    write(out / "others.map", "{ global: cu*; nccl*; pnccl*; local: *; };\n")
    write(out / "build.ninja", ninja(libraries, parts))
    done = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(out)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-1000:])


def ninja(libraries: Libraries, parts: dict[str, list[Path]]) -> str:
    """Return the text of ninja's build file: what to compile and link, and how."""
    launcher = "ccache " if shutil.which("ccache") else ""
    cuda = f"-isystem {libraries.cuda}/include -isystem {libraries.nccl}/include {NO_NUMBERS}"
    torch = f"-isystem {libraries.torch}/include -isystem {libraries.torch}/include/torch/csrc/api/include"
    lines = [
        f"rule compile\n  command = {launcher}g++ {FLAGS} $more -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n"
        "  deps = gcc",
        "rule stub\n  command = gcc -O1 -fPIC -w -fno-builtin -c $in -o $out",
        "rule link\n  command = g++ -shared -pthread -o $out $objects $more",
    ]
    objects: dict[str, list[str]] = {}
    for part, sources in parts.items():
        # torch wants C++20, and its headers are not free of warnings.
        more = f"{cuda} {torch} -std=c++20 -O1 -Wno-error" if part == "operators" else cuda
        objects[part] = [f"{part}_{source.stem}.o" for source in sources]
        for source, name in zip(sources, objects[part], strict=True):
            lines.append(f"build {name}: compile {source}\n  more = {more}")
        if part not in ("operators", "nvml"):
            lines.append(f"build {part}_stubs.o: stub {part}_stubs.c")
            objects[part].append(f"{part}_stubs.o")
    links = {
        "libcudart.so.13": ("runtime", "-Wl,-soname,libcudart.so.13 -Wl,--version-script=runtime.map -ldl", ""),
        "libcuda.so.1": ("driver", "-Wl,-soname,libcuda.so.1 -Wl,--version-script=others.map ./libcudart.so.13", "c"),
        "libnvidia-ml.so.1": ("nvml", "-Wl,-soname,libnvidia-ml.so.1", ""),
        "libnccl.so.2": (
            "nccl",
            "-Wl,-soname,libnccl.so.2 -Wl,--version-script=others.map ./libcudart.so.13 "
            f"-Wl,--disable-new-dtags,-rpath,{libraries.cuda}/lib",
            "c",
        ),
        "simulated_cuda_operators.so": (
            "operators",
            f"-L{libraries.torch}/lib -ltorch_cuda -lc10_cuda -ltorch_cpu -lc10 ./libcudart.so.13",
            "c",
        ),
    }
    for library, (part, more, needs) in links.items():
        after = " | libcudart.so.13" if needs else ""
        own = " ".join(objects[part])
        lines.append(f"build {library}: link {own}{after}\n  objects = {own}\n  more = {more}")
    return "\n".join(lines) + "\n"


def link(site: Path, built: Path) -> None:
    """Put the libraries where torch and the other loaders look: in the environment's own folders."""
    libraries = Libraries(site)
    for name, folder in (
        ("libcudart.so.13", libraries.cuda),
        ("libcudart.so", libraries.cuda),  # as fastsafetensors calls it
        ("libcuda.so.1", libraries.cuda),
        ("libnvidia-ml.so.1", libraries.cuda),
        ("libnccl.so.2", libraries.nccl),
    ):
        place = folder / "lib" / name
        if place.exists() and not place.is_symlink():
            place.rename(place.with_name(name + REAL))
        place.unlink(missing_ok=True)
        place.symlink_to(built / ("libcudart.so.13" if name == "libcudart.so" else name))
    operators = site / "simulated_cuda_operators.so"
    operators.unlink(missing_ok=True)
    operators.symlink_to(built / operators.name)
    shutil.copyfile(HERE / "operators" / "autoload.py", site / "simulated_cuda_autoload.py")
    write(site / "simulated_cuda_autoload.pth", "import simulated_cuda_autoload\n")
