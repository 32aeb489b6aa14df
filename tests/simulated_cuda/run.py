"""Sets up the environment and runs the tests on the simulated CUDA; what `make test-cuda` does.

    python3 tests/simulated_cuda/run.py [--seeds N] [--steps NAME,NAME] [-- PYTEST OPTION ...]

Exits with 1 if a step fails; the last line says the steps, tests, seeds and time.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import environment

LIMIT_S = 1500  # of a step
# Name, files and options, and which of them other seeds run again.
STEPS: dict[str, tuple[list[str], bool]] = {
    "checker": (["tests/simulated_cuda/test_checker.py"], False),
    "gpu": (["tests/test_gpu.py"], False),
    "loads": (
        [
            "tests/test_simulated.py", "tests/test_simulated_order.py", "tests/test_simulated_handle.py",
            "tests/test_simulated_ring.py", "tests/test_simulated_failures.py",
        ],
        True,
    ),
    "others": (
        ["-m", "simulated", "tests/test_load_into.py", "tests/test_load_stats.py", "tests/test_fault_loops.py"],
        False,
    ),
    "flags": (["tests/simulated_cuda/test_flags.py"], False),
    "groups": (["tests/test_simulated_group.py", "tests/test_simulated_collectives.py"], False),
    "nccl": (["tests/simulated_cuda/test_nccl.py"], False),
}  # fmt: skip


def variables(seed: int, reports: Path) -> dict[str, str]:
    return {
        **environment.environment(),
        "WEIGHTLOAD_TEST_ACCELERATOR": "cuda",
        "WEIGHTLOAD_REQUIRE_GPU": "1",
        "WEIGHTLOAD_SIMULATED_SEED": str(seed),
        "WEIGHTLOAD_SIMULATED_CUDA_REPORTS": str(reports),
    }


def run_step(name: str, seed: int, options: list[str]) -> tuple[bool, int]:
    """Whether it passed, and how many tests."""
    reports = environment.BUILD / f"reports.{os.getpid()}"
    reports.unlink(missing_ok=True)
    command = [environment.PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *STEPS[name][0], *options]
    with subprocess.Popen(
        command, cwd=environment.TREE, env=variables(seed, reports), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        last = ""
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line if " passed" in line or " failed" in line else last
            code = process.wait(LIMIT_S)
        except BaseException:
            process.kill()
            raise
    passed = re.search(r"(\d+) passed", last)
    # Of a process that ended after its test had looked.
    late = reports.read_text() if reports.exists() else ""
    if late:
        print(f"reports after the last test:\n{late}")
        reports.unlink()
    return code == 0 and not late, int(passed.group(1)) if passed else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="runs of the loads, each under another seed")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("options", nargs="*", help="of pytest")
    chosen = parser.parse_args()
    begin = time.monotonic()
    environment.set_up()
    first = int(os.environ.get("WEIGHTLOAD_SIMULATED_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
    seeds = range(first, first + chosen.seeds)
    failed, tests = [], 0
    for name in chosen.steps.split(","):
        for seed in seeds if STEPS[name][1] else seeds[:1]:
            environment.say(begin, f"{name}, seed {seed}")
            passed, count = run_step(name, seed, chosen.options)
            tests += count
            if not passed:
                failed.append(f"{name} (seed {seed})")
    outcome = "failed: " + ", ".join(failed) if failed else "no failure, no report"
    span = f"seed {first}" if chosen.seeds == 1 else f"seeds {first} to {seeds[-1]}"
    print(f"make test-cuda: {tests} tests passed, {span}, {time.monotonic() - begin:.0f} s; {outcome}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
