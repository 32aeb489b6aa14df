"""``weightload tune PATH``: which settings are worth changing on this machine and storage."""

from __future__ import annotations

import argparse
import math
import sys

from weightload import devices, terminal
from weightload.cli_common import OK, Commands, add_checkpoint, add_command, print_json, resolve, say, tell

DESCRIPTION = """\
Load a sample of a checkpoint (at most 2 GB) again and again, with the settings in force and with others, and say which
settings are worth changing, if any: those that are faster by 10 % and by more than loads of one kind differ, and are so
once more when measured again, at least 5 loads of each, by more than chance would bring about in 1 of 200 comparisons.
Where there is no time for so many loads nothing is recommended, and the report says so.

For cold loads the files are put out of the page cache before each load. That drops clean pages of these files only and
changes no byte of them, but other processes that use the files read them from storage again. Nothing is written.
Loads to an accelerator take the sample's size of its memory. Other work on the machine or its storage makes loads
differ, and what that may explain is not recommended: run it where little else is going on.
"""


def add(commands: Commands) -> None:
    """Make the command known."""
    command = add_command(
        commands,
        "tune",
        help="measure loads here, and say which settings are worth changing (evicts the files from the page cache)",
        description=DESCRIPTION,
    )
    command.add_argument("--device", default="cpu", help="where to load to, such as cuda:0 (default: cpu)")
    command.add_argument("--seconds", type=_seconds, default=45.0, help="time for all of it (default: 45)")
    command.add_argument("--json", action="store_true", help="print JSON, with the seconds of every load")
    add_checkpoint(command)
    command.set_defaults(run=run)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0")
    return seconds


def run(options: argparse.Namespace) -> int:
    from weightload import tune_report  # only this command needs these
    from weightload.tune import tune

    device = devices.resolve(options.device)
    paths = resolve(options)
    done = tune(paths, device, options.seconds, tell=_tell)
    if options.json:
        print_json(tune_report.as_json(done))
    else:
        for line in tune_report.lines(done):
            say(line)
    return OK


def _tell(text: str) -> None:
    """What is going on, for whoever sits before it."""
    if terminal.is_terminal(sys.stderr):
        tell(f"{text} ...")
