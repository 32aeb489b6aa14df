"""Runs the fuzz target for a while, then compares what it found with safetensors' verdicts.

    python tests/fuzz/run.py [--seconds 1800] [--engine libfuzzer|standalone]

Inputs that reach new code are kept in .build/fuzz/corpus and are where the next run starts; inputs that fail are in
.build/fuzz/crashes. `.build/fuzz/ENGINE/fuzz_checkpoint FILE` runs one again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz import build, verdicts
from fuzz.seeds import CHOICES_BYTES

CORPUS = build.BUILD / "corpus"
CRASHES = build.BUILD / "crashes"


def command(program: Path, crashes: Path, *limits: str) -> list[str]:
    """The program with the seeds and what both engines are given; memory in MiB, time in seconds."""
    crashes.mkdir(parents=True, exist_ok=True)
    options = [f"-dict={build.DICTIONARY}", f"-artifact_prefix={crashes}/", "-print_final_stats=1", *limits]
    # One allocation of 64 MiB would be a claim believed; no input is larger than 16 KiB.
    return [str(program), *options, "-timeout=20", "-rss_limit_mb=2048", "-malloc_limit_mb=64", "-max_len=16384"]


def executions(output: str) -> int:
    found = re.findall(r"stat::number_of_executed_units: (\d+)", output)
    return int(found[-1]) if found else 0


def disagreements(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.iterdir()):
        sentence = verdicts.disagreement(path.read_bytes()[CHOICES_BYTES:])
        if sentence:
            found.append(f"{path}: {sentence}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--engine", choices=build.ENGINES, default="libfuzzer" if build.clang() else "standalone")
    arguments = parser.parse_args()
    program = build.build(arguments.engine)
    CORPUS.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={arguments.seconds}", "-runs=-1"]
    print(f"{arguments.engine} for {arguments.seconds} seconds; its output is in {build.BUILD}/log", flush=True)
    with (build.BUILD / "log").open("w") as log:
        done = subprocess.run(
            [*command(program, CRASHES, *limits), str(CORPUS), str(build.SEEDS)], stdout=log, stderr=subprocess.STDOUT
        )
    output = (build.BUILD / "log").read_text(errors="replace")
    print(f"{executions(output)} executions, exit status {done.returncode}, {len(list(CORPUS.iterdir()))} inputs kept")
    if done.returncode != 0:
        print(output[-4000:], f"\nThe input is in {CRASHES}")
        return 1
    differing = disagreements(CORPUS) + disagreements(build.SEEDS)
    print(f"{len(differing)} disagreements with safetensors", *differing, sep="\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
