"""Compares all loaders that are installed, side by side in one run; `make compare` sets everything up for it.

    python benchmarks/compare_loaders.py --model-path MODEL [--subfolder NAME] [--device cpu] [--cold] [--tmpfs]
        [--ranks 1,2] [--fresh 3] [--repeats 5] [--loaders NAME,NAME] [--json FILE] [--plot FILE] [--title NAME]

Every loader runs in a process of its own and moves all tensors to the device, where they are kept in a dict. Loads are
compared with their like: on the CPU those that map the files (timed until every page has been touched), those that
give private memory, and those that fill parameters that are there; on an accelerator all. Several settings of a loader
are several loaders; all of them run in heats (--heats), and the fastest of each goes on to the rounds that are counted.

First, untimed, each loader's memory is watched in one load, and in another its tensors are compared: every byte of all,
once they are held, and of a sample also as they are yielded. Of timed loads only the ends of that sample are compared;
the result says what exactly. Then loaders and limits take turns in every round, shuffled each time (--seed), from a
verified state of the page cache, in the processes that are kept; and after that in new processes, whose first load is
timed too. A loader that gives wrong bytes in any load is reported as WRONG and has no time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from checkpoints.expected import RANKS, TIMED, UNTIMED
from gpu.limits import environment
from harness import compare_ranks
from harness.compare_run import Arm, Rounds, start_all
from harness.machine import fill_cache
from harness.proc import available_memory, file_system
from loaders.peers import DEVICE, INTO, MAPPED, PEERS, PRIVATE, SWEEP, default_names
from loaders.worker import a_device
from report import compare_plot, compare_report
from report.compare_summary import summarise

import weightload


def read_header(path: str) -> tuple[dict[str, Any], int]:
    """The tensors of a file, and the bytes of all."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, os.path.getsize(path) - 8 - length


@contextlib.contextmanager
def copied_to_tmpfs(files: list[str], folder: str) -> Iterator[tuple[list[str], str | None]]:
    """Copies of the files in memory, or the reason why there is no room for them."""
    total = sum(map(os.path.getsize, files))
    # The copies, private tensors of a load, what the limits use, and a margin.
    needed = 3 * total + (2 << 30)
    if file_system(folder) != "tmpfs":
        yield [], f"{folder} is not a tmpfs"
    elif shutil.disk_usage(folder).free < total * 1.02:
        yield [], f"{folder} has no room for {total / 1e9:.1f} GB"
    elif available_memory() < needed:
        yield (
            [],
            f"{needed / 1e9:.1f} GB of memory would be needed, and {available_memory() / 1e9:.1f} GB are available",
        )
    else:
        with tempfile.TemporaryDirectory(dir=folder) as copies:
            yield [shutil.copyfile(file, Path(copies, os.path.basename(file))).as_posix() for file in files], None


class Comparison:
    """The files, the loaders, and what has been measured so far."""

    def __init__(self, files: list[str], options: argparse.Namespace, log: IO[bytes]) -> None:
        self.files, self.options, self.log = files, options, log
        headers = [read_header(file) for file in files]
        self.tensors = sum(len(header) for header, _ in headers)
        self.total = sum(size for _, size in headers)
        self.checked: list[str] = []  # what has been compared with the files, in words
        self.order = random.Random(options.seed)
        self.scenarios: list[dict[str, Any]] = []
        self.arms = [Arm(name, files, options.device, log, options.limit_s) for name in options.loaders]
        self.kinds = [DEVICE] if options.device.type != "cpu" else [MAPPED, PRIVATE, INTO]
        self.kinds = [kind for kind in self.kinds if any(arm.kind == kind for arm in self.arms)]

    def run(self) -> None:
        """Everything that was asked for; whoever stops this has what was measured until then."""
        options = self.options
        if 1 in options.ranks:
            fill_cache(self.files)
            start_all(self.arms)
            for arm in self.arms:
                arm.check()
            self.checked += [UNTIMED, TIMED]
            for kind in self.kinds:
                self._measure(self.files, "disk", "warm", kind)
            for kind in [kind for kind in self.kinds if options.cold and kind != INTO]:
                self._measure(self.files, "disk", "cold", kind)
            if options.tmpfs:
                self._measure_tmpfs()
        for ranks in options.ranks:
            if ranks > 1:
                self.close()  # their processes would only take memory
                found = compare_ranks.run((len(self.files), self.tensors, self.total), ranks, options, self.log)
                self.checked += [RANKS] if "rows" in found and RANKS not in self.checked else []
                self.scenarios += compare_ranks.scenarios(found, options.device)
        self._keep()

    def _measure(self, files: list[str], place: str, cache: str, kind: str) -> None:
        rounds = Rounds(self.arms, files, place, cache, kind, self.order)
        found = rounds.run(self.options.device, self.options)
        self.scenarios.append(found)
        self._keep()
        shown = self.result()["scenarios"][-1]
        print(f"{compare_report.title(shown)}: {shown['verdict']}", file=sys.stderr)  # it takes minutes

    def _measure_tmpfs(self) -> None:
        kinds = [kind for kind in self.kinds if kind != INTO]
        with copied_to_tmpfs(self.files, self.options.tmpfs) as (files, reason):
            for kind in kinds:
                if reason:
                    nothing: dict[str, Any] = {"limits": [], "rows": [], "note": None}
                    self.scenarios.append(
                        {"place": "tmpfs", "cache": "warm", "kind": kind, "reason": reason, **nothing}
                    )
                else:
                    self._measure(files, "tmpfs", "warm", kind)

    def close(self) -> None:
        for arm in self.arms:
            arm.close()

    def result(self) -> dict[str, Any]:
        """Rows for tables and pictures; a loader that gave wrong bytes keeps the reason and loses its times."""
        facts = {arm.name: arm.facts for arm in self.arms}
        options = self.options
        place = environment(options.device, self.files)
        if options.device.type == "cpu":
            place |= {"device": "cpu"}  # here that is a measurement
        place["versions"] |= {arm.facts["of"]: arm.facts["version"] for arm in self.arms if arm.facts["version"]}
        return {
            "benchmark": "compare_loaders",
            "checkpoint": options.title or Path(options.model_path).name,
            "files": len(self.files),
            "tensors": self.tensors,
            "bytes": self.total,
            "file_system": file_system(self.files[0]),
            "checked": self.checked,
            "heats": options.heats,
            "seed": options.seed,
            **place,
            "loaders": facts,
            "scenarios": [summarise(json.loads(json.dumps(s)), facts, self.total) for s in self.scenarios],
        }

    def _keep(self) -> None:
        """Written after every step."""
        if self.options.json:
            partial = self.options.json.with_suffix(".part")
            partial.write_text(json.dumps(self.result(), indent=1))
            os.replace(partial, self.options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="a safetensors file, an index or a directory")
    parser.add_argument("--subfolder", help="a folder below, such as diffusers' transformer")
    parser.add_argument("--device", type=a_device, default="cpu")
    parser.add_argument("--cold", action="store_true", help="also measure with the files evicted from the page cache")
    parser.add_argument("--tmpfs", nargs="?", const="/dev/shm", metavar="DIR", help="also with copies there (/dev/shm)")
    parser.add_argument("--ranks", default="1", metavar="N,N", help="so many ranks load the same at once (default: 1)")
    parser.add_argument("--fresh", type=int, default=3, help="new processes of each loader whose first load is timed")
    parser.add_argument("--warmup", type=int, default=0, help="rounds that are not counted; the check warms up already")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--heats", type=int, default=2, help="rounds before, that choose among the settings of one")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the order (default: a new one)")
    parser.add_argument("--loaders", help=f"of {', '.join(PEERS)}; or FILE.py:FUNCTION. Default: all")
    parser.add_argument("--sweep", action="store_true", help="weightload also with 8, 12 and 15 threads")
    parser.add_argument(
        "--budget",
        type=float,
        default=1e9,
        metavar="S",
        help="time for the counted rounds of a scenario: no round but the first begins that would end later",
    )
    parser.add_argument("--limit-s", type=float, default=120, metavar="S", help="longest time that one load may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    parser.add_argument("--title", help="what to call the checkpoint")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what the loaders print (default: nowhere)")
    options = parser.parse_args()
    options.ranks = [int(number) for number in options.ranks.split(",")]
    given = [name.strip() for name in options.loaders.split(",")] if options.loaders else default_names(options.device)
    options.loaders = list(dict.fromkeys([*given, *(SWEEP if options.sweep else ())]))
    if options.repeats < 1 or options.heats < 1:
        parser.error("--repeats, --heats: at least 1")
    return options


def main() -> None:
    """Command line."""
    options = parse()
    files = weightload.resolve_safetensors_files(options.model_path, options.subfolder)
    # So that copies and processes are cleared away also then.
    signal.signal(signal.SIGTERM, lambda *_: exit(143))
    for path in (options.json, options.plot, options.log):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    with options.log.open("wb") if options.log else tempfile.TemporaryFile() as log:
        comparison = Comparison(files, options, log)
        try:
            comparison.run()
        finally:
            comparison.close()
    result = comparison.result()
    compare_report.print_table(result)
    if options.plot:
        compare_plot.save_plot([result], options.plot, everything=True)


if __name__ == "__main__":
    main()
