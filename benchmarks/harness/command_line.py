"""Shared by the two scripts for people: wrong arguments answered in a line, and how far a run is, on stderr."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

from harness.machine import NotEvictedError
from harness.ranks import Ranks
from weightload import settings
from weightload._base import terminal
from weightload._base.printable import printable
from weightload._checkpoint.resolve import resolve_and_tell
from weightload._checkpoint.selection import open_files
from weightload._group.ranks import global_rank
from weightload._load import devices, progress

SECONDS_BETWEEN_LINES = 5.0  # where there is no bar


class Parser(argparse.ArgumentParser):
    """The arguments that both scripts have; what is wrong with any is told in one line."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=(doc or "").splitlines()[0])
        self.add_argument("--model-path", required=True, help="a safetensors file, an index or a directory")
        self.add_argument("--subfolder", help="a folder below, such as diffusers' transformer")
        self.add_argument("--warmup", type=at_least(0), default=1, metavar="N", help="rounds that are not counted (1)")
        self.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="rounds that are counted (5)")
        self.add_argument("--json", type=Path, metavar="FILE", help="write all results")
        self.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
        self.add_argument("--title", help="what to call the checkpoint")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (--help shows all arguments)\n")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from {least}")
        return int(text)

    return number


def usable_device(name: str) -> torch.device:
    """The type of an argument that is a device; as it is named, with a number or without."""
    try:
        device, default = torch.device(name), devices.default_device()
        # One without a number is this rank's own: nothing is asked of the current one, which may be another rank's.
        devices.resolve(default if device.index is None and device.type == default.type else device)
    except RuntimeError as error:  # torch's, of a name
        raise argparse.ArgumentTypeError(f"no such device: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return device


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The files of a run."""

    title: str
    files: list[str]
    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.title}: {self.bytes / 1e9:.2f} GB, {self.tensors} tensors, {len(self.files)} file(s)"


def checkpoint_of(parser: Parser, options: argparse.Namespace, ranks: Ranks) -> Checkpoint:
    """Open the named files, once. If that fails on any rank, all end, and a rank of that node says why."""
    wrong, found = "", None
    try:
        settings.current()
        if ranks.first:
            _require_writable(options)
        files = resolve_and_tell(options.model_path, options.subfolder, None, say if ranks.first else lambda _: None)
        opened = open_files(files)
        title = options.title or Path(options.model_path).name
        total = sum(file.size - file.data_begin for file in opened)
        found = Checkpoint(title, files, sum(map(len, opened)), total)
        if not total:
            wrong = f"{options.model_path}: there is no tensor to load"
    except (OSError, ValueError, SafetensorError) as error:
        wrong = str(error)
    if not ranks.most([float(bool(wrong))])[0] and found:
        return found
    if wrong and ranks.first_of_node:
        say(f"{parser.prog}: {wrong}")
    ranks.barrier()  # a launcher kills the others when the first one ends
    ranks.close()
    sys.exit(2)


def _require_writable(options: argparse.Namespace) -> None:
    """Better before the run than after it."""
    for path in filter(None, (options.json, options.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{path}: cannot be written")
    if options.plot and options.plot.suffix:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ModuleNotFoundError:
            raise ValueError("--plot needs matplotlib, which is not installed") from None
        if options.plot.suffix[1:] not in FigureCanvasBase.filetypes:
            raise ValueError(f"--plot {options.plot}: no format of pictures, such as .png")


def say(line: str) -> None:
    """Write a line to stderr."""
    terminal.to_stderr(printable(line))


class Steps:
    """Tells how far a run is. Only the first rank speaks."""

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, 0

    @contextlib.contextmanager
    def next(self, what: str, loads: int) -> Iterator[progress.Advance]:
        """Says what is done now; gives a function to call with the loads as they are done.

        On a terminal a bar shows how far that is, elsewhere a line now and then.
        """
        self._begun += 1
        if global_rank() != 0:
            yield progress.unseen
            return
        say(f"{self._begun} of {self._count}: {what}, {loads} loads")
        if terminal.is_terminal(sys.stderr):
            with progress.bar(loads, None, what=what, unit=" loads") as advance:
                yield advance
            return
        done, last = 0, time.monotonic()

        def advance_in_lines(count: int) -> None:
            nonlocal done, last
            done += count
            if done < loads and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                say(f"{self._begun} of {self._count}: {what}, {done} of {loads} loads done")

        yield advance_in_lines


def run(main: Callable[[], None]) -> None:
    """Call a script's main; what ends it without being a fault is told in a line."""
    try:
        main()
    except NotEvictedError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
