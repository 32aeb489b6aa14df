"""Shows that the tests on the simulated CUDA bite: the simulated accelerator's defects, one at a time, tried on it.

    python3 tests/simulated_cuda/defects.py [--rows FILE] [NAME ...]

Works on a copy of the tree in .build/cuda/defects. A defect is caught by wrong bytes, by the checker, or by both: the
tests named with it are run, and what they say is looked through. Exits with 1 if fewer than LEAST are caught.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import environment

# Import it by itself, not from its package: that needs torch, and this does not.
sys.path.insert(0, str(Path(__file__).parent.parent / "simulated_accelerator"))

from defects import DEFECTS, Defect

TREE = environment.BUILD / "defects"
LEAST = 20
LIMIT_S = 600
# These consumers are enough for the loads that ranks share.
FEWER = "keep_all or use_and_drop or into_parameters or not every_rank_gets_every_byte"


def run_tests(tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether they all pass, and all they said."""
    reports = environment.BUILD / f"defect-reports.{os.getpid()}"
    reports.unlink(missing_ok=True)
    variables = {
        **environment.environment(TREE),
        "WEIGHTLOAD_TEST_ACCELERATOR": "cuda",
        "WEIGHTLOAD_REQUIRE_GPU": "1",
        "WEIGHTLOAD_SIMULATED_CUDA_REPORTS": str(reports),
    }
    command = [
        environment.PYTHON,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-k",
        FEWER,
        *tests,
    ]
    try:
        done = subprocess.run(command, cwd=TREE, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return True, ""  # no verdict: what hangs is ended by the tests' own limits
    late = reports.read_text() if reports.exists() else ""
    reports.unlink(missing_ok=True)
    return done.returncode == 0 and not late, done.stdout + done.stderr + late


def verdict(output: str) -> str:
    """Name what caught a defect: the checker, a check of the test's own (wrong bytes among them), a hang."""
    by = []
    if "race: " in output:
        by.append("race")
    if "changed: page-locked" in output:
        by.append("changed source")
    if "collectives do not match" in output:
        by.append("unmatched collectives")
    if "hangs" in output:
        by.append("hang")
    if not by or "torch.equal" in output:
        by.append("the test's own check")
    return ", ".join(by)


def check(defect: Defect) -> tuple[bool, str]:
    """Whether it is caught, and by what."""
    path = TREE / defect.file
    text = path.read_text()
    assert text.count(defect.right) == 1, defect.name
    path.write_text(text.replace(defect.right, defect.wrong))
    try:
        environment.build_weightload(TREE)
        outcomes = [run_tests((test,)) for test in defect.tests]
    finally:
        path.write_text(text)
    caught = [output for passed, output in outcomes if not passed]
    return bool(caught), "; ".join(dict.fromkeys(verdict(output) for output in caught)) or "nothing"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, help="where to add the table's rows")
    parser.add_argument("names", nargs="*")
    chosen = parser.parse_args()
    defects = [defect for defect in DEFECTS if not chosen.names or defect.name in chosen.names]
    environment.set_up()
    environment.copy_tree(TREE)
    os.environ["WEIGHTLOAD_WERROR"] = "0"  # a defect may leave something unused
    environment.build_weightload(TREE)
    count = 0
    begin = time.monotonic()
    for number, defect in enumerate(defects, 1):
        caught, by = check(defect)
        count += caught
        environment.say(begin, f"{number:2} {'caught ' if caught else 'ESCAPED'} {defect.name}: {by}")
        if chosen.rows:
            with chosen.rows.open("a") as rows:
                rows.write(f"| {defect.name} | {by} |\n")
    environment.build_weightload(TREE)
    print(f"{count} of {len(defects)} defects caught")
    return int(count < min(LEAST, len(defects)))


if __name__ == "__main__":
    sys.exit(main())
