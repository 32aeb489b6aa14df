"""Sets up the environment and runs the tests on the simulated CUDA; what `make test-cuda` does.

    python3 tests/simulated_cuda/run.py [--seeds N] [--steps NAME,NAME] [-- PYTEST OPTION ...]

Exits with 1 if a step fails, with 3 if CUDA's torch cannot be had here; the last line says the steps, tests, seeds and
time, or why.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import environment

LIMIT_S = 1800  # of a step
UNAVAILABLE = 3  # the exit status
STRESS = "tests/simulated_accelerator/stress.py"
STEPS: dict[str, list[str]] = {
    "checker": ["tests/simulated_cuda/test_checker.py"],
    "gpu": ["tests/accelerator/test_gpu.py"],
    "loads": [
        "tests/accelerator/test_simulated.py", "tests/accelerator/test_simulated_order.py",
        "tests/accelerator/test_simulated_handle.py", "tests/accelerator/test_simulated_ring.py",
        "tests/accelerator/test_simulated_failures.py", "tests/accelerator/test_simulated_parts.py",
    ],
    "others": [
        "-m", "simulated", "tests/into/test_load_into.py", "tests/api/test_load_stats.py",
        "tests/failures/test_fault_loops.py", "tests/storage/test_overlay.py",
        "tests/checkpoint/test_hostile_files.py",
    ],
    "flags": ["tests/simulated_cuda/test_flags.py"],
    "groups": [
        "tests/accelerator/test_simulated_group.py", "tests/accelerator/test_simulated_collectives.py",
        "tests/accelerator/test_simulated_replicas.py",
    ],
    "nccl": ["tests/simulated_cuda/test_nccl.py"],
    "seeds": [],  # loads of every kind, each with choices and delays of its own seed
    # Where make test-engines has been run, and only where it is asked for.
    "engines": ["tests/engines/test_vllm_loader.py", "tests/engines/test_in_parts.py", "tests/engines/test_vllm.py"],
    "benchmarks": [],  # benchmarks/gpu/check.sh, with the other loaders; only where it is asked for
}  # fmt: skip
DEFAULT = [name for name in STEPS if name not in ("engines", "benchmarks")]


def variables(seed: int, reports: Path) -> dict[str, str]:
    return {
        **environment.environment(),
        "WEIGHTLOAD_TEST_ACCELERATOR": "cuda",
        "WEIGHTLOAD_REQUIRE_GPU": "1",
        "WEIGHTLOAD_SIMULATED_SEED": str(seed),
        "WEIGHTLOAD_SIMULATED_CUDA_REPORTS": str(reports),
    }


def run_step(name: str, seed: int, seeds: int, options: list[str]) -> tuple[bool, int]:
    """Whether it passed, and how many tests."""
    reports = environment.BUILD / f"reports.{os.getpid()}"
    reports.unlink(missing_ok=True)
    command = [environment.PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *STEPS[name], *options]
    if name == "seeds":
        command = [environment.PYTHON, STRESS, "--first", str(seed), "--seeds", str(seeds)]
    environ = variables(seed, reports)
    if name == "engines":
        environ["PYTHONPATH"] += os.pathsep + str(environment.link_engines())
    if name == "benchmarks":
        command = ["bash", "benchmarks/gpu/check.sh", environment.BUILD / "gpu-check"]
        environ |= {
            "PYTHON": str(environment.PYTHON),
            "WEIGHTLOAD_PEERS": str(environment.install_peers()),
            # One of them opens libcudart.so by that name alone.
            "LD_LIBRARY_PATH": str(environment.site_packages() / "nvidia" / "cu13" / "lib"),
        }
    passed = 0
    with subprocess.Popen(command, cwd=environment.TREE, env=environ, stdout=subprocess.PIPE, text=True) as process:
        # Steps end by themselves, as every test has a limit; this is for what has none.
        watch = threading.Timer(LIMIT_S, process.kill)
        watch.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"(\d+) passed", line):
                passed = int(found.group(1))
        code = process.wait()
        watch.cancel()
    # Show the reports of a process that ended after its test had looked.
    late = reports.read_text() if reports.exists() else ""
    if late:
        print(f"reports after the last test:\n{late}")
        reports.unlink()
    return code == 0 and not late, passed


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="loads of the last step, each under another")
    parser.add_argument("--steps", default=",".join(DEFAULT), help=f"of {', '.join(STEPS)}")
    parser.add_argument("options", nargs="*", help="of pytest")
    chosen = parser.parse_args()
    begin = time.monotonic()
    try:
        environment.set_up()
    except environment.Unavailable as error:
        print(f"make test-cuda: not possible here: {error}")
        return UNAVAILABLE
    first = int(os.environ.get("WEIGHTLOAD_SIMULATED_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
    failed, tests = [], 0
    for name in chosen.steps.split(","):
        environment.say(begin, f"{name}, seed {first}")
        passed, count = run_step(name, first, chosen.seeds, chosen.options)
        tests += count
        if not passed:
            failed.append(name)
    outcome = "failed: " + ", ".join(failed) if failed else "no failure, no report"
    span = f"seed {first}, loads under {chosen.seeds} seeds"
    print(f"make test-cuda: {tests} tests passed, {span}, {time.monotonic() - begin:.0f} s; {outcome}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
