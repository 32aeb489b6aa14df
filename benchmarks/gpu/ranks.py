"""Compares the ways in which several ranks load one checkpoint where all of them share one GPU, over real NCCL.

    python benchmarks/gpu/ranks.py --model-path MODEL [--device cuda:0] [--ranks 2,4] [--backends NAME NAME]
        [--nccl FILE] [--scratch DIR] [--ways NAME,NAME] [--repeats 2] [--limit-s 240] [--json FILE]

Every run is a torchrun of benchmark_weight_loading_comparison.py, which compares all tensors with safetensors', byte
for byte, before it times anything. Ratios show what goes wrong, not what a machine with a GPU for every rank does: here
the ranks' kernels take turns, and nothing crosses NVLink. Over "cpu:gloo,cuda:nccl" the ranks' records travel by gloo,
over "nccl" through the GPU, as the weights do.

NCCL lets ranks share a GPU from 2.30 on. Where torch's is older, a newer libnccl.so.2 (--nccl, also packed as .xz) is
preloaded. Where there is none, or NCCL refuses, the result says so, and the exit status is 77; with --device cpu the
logic is tried over gloo, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from loaders.worker import a_device

import weightload
from gpu.limits import environment
from gpu.report import print_ranks

COMPARISON = Path(__file__).parent.parent / "benchmark_weight_loading_comparison.py"
KIT_NCCL = Path(".kit/libnccl.so.2.xz")
LEAST_NCCL = 23000
# Ways to ask for where the backend is the whole question, and where it is not; "auto" is one of the others.
FEW = "python broadcast,weightload broadcast,weightload striped"
MOST = f"python independent,python async broadcast,weightload independent,{FEW}"
LEAST_S, LONG_S = 20, 70  # a run that has less is not begun; one that has this should end in time
REFUSALS = ("Duplicate GPU detected",)
SKIPPED = 77
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # host names may lead nowhere

# The NCCL that torch calls in a process of this environment.
ASK_VERSION = """
import ctypes, torch
version = ctypes.c_int()
ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
print(version.value)
"""


def nccl_version(environ: dict[str, str]) -> int:
    """Such as 23203 for 2.32.3; 0 if there is none."""
    asked = subprocess.run([sys.executable, "-c", ASK_VERSION], env=environ, capture_output=True, text=True)
    print(asked.stderr, end="")
    return int(asked.stdout) if asked.returncode == 0 else 0


def in_words(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "none"


def unpacked(library: Path, folder: Path) -> Path:
    """The library itself, under the name that torch asks for."""
    if library.suffix != ".xz":
        return library.resolve()
    target = folder.resolve() / "libnccl.so.2"
    with lzma.open(library) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 16 << 20)
    return target


def prepared(library: Path, folder: Path) -> tuple[dict[str, str], int, str | None]:
    """An environment in which ranks can share a GPU, its NCCL, and why it does not serve."""
    environ = {**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_DEBUG": "WARN"}
    for variable in INTERFACES:
        environ.setdefault(variable, "lo")
    version = nccl_version(environ)
    if version < LEAST_NCCL and library.exists():
        environ["LD_PRELOAD"] = " ".join(filter(None, [str(unpacked(library, folder)), environ.get("LD_PRELOAD")]))
        version = nccl_version(environ)
    if version >= LEAST_NCCL:
        return environ, version, None
    why = f"{library} did not replace it" if library.exists() else f"there is no {library}"
    return environ, version, f"NCCL {in_words(version)} lets no two ranks share a GPU (2.30 does), and {why}"


def run_ranks(command: list[str], environ: dict[str, str], limit: float) -> tuple[bool, str]:
    """Whether it ended well, and in time; and all it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
        in_time = True
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            in_time = False
            process.terminate()  # torchrun ends its ranks
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.seek(0)
        output = log.read()
    print(output, flush=True)
    return in_time and process.returncode == 0, output if in_time else f"{output}\nError: not done in {limit:.0f} s"


def reason(output: str) -> tuple[bool, str]:
    """Whether NCCL refused, and the line that says best what went wrong."""
    lines = [line.strip() for line in output.splitlines() if "ChildFailedError" not in line]
    for pattern in (*REFUSALS, "does not give the bytes", r"\w*(Error|Exception)\b.*: "):
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            return pattern in REFUSALS, found[-1][:400]
    return False, "failed without a word"


class Runs:
    """Every number of ranks with every backend, until the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.limit_s
        self.environ, version, self.refusal = dict(os.environ), 0, None
        if options.device.type == "cuda":
            self.environ, version, self.refusal = prepared(options.nccl, options.scratch)
        for variable in INTERFACES:
            self.environ.setdefault(variable, "lo")
        self.environ.setdefault("OMP_NUM_THREADS", "4")  # for the comparison of bytes
        files = weightload.resolve_safetensors_files(options.model_path)
        self.result: dict[str, Any] = {
            "benchmark": "gpu_ranks",
            "checkpoint": options.title or Path(options.model_path).name,
            "unproven": True,  # until a run over NCCL has ended well
            "nccl": in_words(version),
            "nccl_multi_rank": self.environ.get("NCCL_MULTI_RANK_GPU_ENABLE"),
            "nccl_preloaded": self.environ.get("LD_PRELOAD") if options.device.type == "cuda" else None,
            **environment(options.device, files),
            "runs": [],
        }

    def all(self) -> None:
        wanted = [(ranks, backend) for ranks in self.options.ranks for backend in self.options.backends]
        for number, (ranks, backend) in enumerate(wanted):
            left = self.deadline - time.monotonic()
            # One that hangs leaves time for the others.
            self._one(ranks, backend, min(left, max(LONG_S, 1.5 * left / (len(wanted) - number))))
            if self.options.json:  # whoever stops this has what was measured until then
                self.options.json.write_text(json.dumps(self.result, indent=1))

    def _one(self, ranks: int, backend: str, limit: float) -> None:
        run: dict[str, Any] = {"ranks": ranks, "backend": backend, "failed": False, "reason": self.refusal}
        self.result["runs"].append(run)
        if self.refusal:
            return
        if limit < LEAST_S:
            run |= {"failed": True, "reason": "no time left"}
            return
        print(f"=== {ranks} ranks, {backend}, at most {limit:.0f} s", flush=True)
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "result.json")
            good, output = run_ranks(self._command(ranks, backend, answer), self.environ, limit)
            if good:
                run["result"] = json.loads(answer.read_text())
                if self.options.device.type == "cuda":
                    self.result["unproven"] = False
            else:
                refused, run["reason"] = reason(output)
                run["failed"] = not refused
                self.refusal = f"NCCL {self.result['nccl']} refuses: {run['reason']}" if refused else None
        run["seconds"] = time.monotonic() - begin

    def _command(self, ranks: int, backend: str, answer: Path) -> list[str]:
        options = self.options
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        ways = options.ways or (MOST if "," in backend else FEW)
        # A device with its number: LOCAL_RANK is beyond the only one. The comparison of bytes is the warm-up.
        return [
            *launcher, f"--nproc-per-node={ranks}", str(COMPARISON), "--model-path", str(options.model_path),
            "--device", str(options.device), "--backend", backend, "--warmup", "0", "--repeats", str(options.repeats),
            "--ways", ways, "--title", self.result["checkpoint"], "--json", str(answer),
        ]  # fmt: skip

    def status(self) -> int:
        """The exit status of this process."""
        if any(run["failed"] for run in self.result["runs"]):
            return 1
        return SKIPPED if any(run["reason"] for run in self.result["runs"]) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="a safetensors file, an index or a directory")
    parser.add_argument("--device", type=a_device, default="cuda:0", help="the one that all ranks use")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks, one after the other")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: with one for the CPU, and without")
    parser.add_argument("--nccl", type=Path, default=KIT_NCCL, metavar="FILE", help="what to use if torch's is too old")
    parser.add_argument("--scratch", type=Path, default=tempfile.gettempdir(), metavar="DIR", help="to unpack it to")
    parser.add_argument("--ways", metavar="NAME,NAME", help="default: most, or few where records take the GPU")
    parser.add_argument("--repeats", type=int, default=2, help="rounds that are counted")
    parser.add_argument("--limit-s", type=float, default=240, metavar="S", help="longest time for all of it")
    parser.add_argument("--title", help="what to call the checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args()
    options.ranks = [int(number) for number in options.ranks.split(",")]
    if not options.backends:
        logic_only = options.device.type == "cpu"
        options.backends = ["cpu:gloo", "gloo"] if logic_only else ["cpu:gloo,cuda:nccl", "nccl"]
    return options


def main() -> None:
    """Command line."""
    options = parse()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    runs = Runs(options)
    runs.all()
    print_ranks(runs.result)
    raise SystemExit(runs.status())


if __name__ == "__main__":
    main()
