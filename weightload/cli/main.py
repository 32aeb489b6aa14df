"""The command line: ``weightload COMMAND``, with a file for each command beside this one."""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import NoReturn

from safetensors import SafetensorError

from weightload import __version__, settings
from weightload._base.addresses import shown
from weightload.cli import inspect as cli_inspect
from weightload.cli import load as cli_load
from weightload.cli import settings as cli_settings
from weightload.cli import verify as cli_verify
from weightload.cli.common import (
    BROKEN,
    EPILOG,
    OK,
    STOPPED,
    UNPRINTED,
    UNUSABLE,
    USAGE,
    Unprinted,
    flush,
    tell,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    try:
        settings.current()  # said at once, whether or not the command would have used it
        code = int(options.run(options))
        flush()
        return code
    except BrokenPipeError:
        _drop_output()  # whoever read it has seen enough
        return OK
    except Unprinted as error:
        _drop_output()
        tell(f"weightload: {error}")
        return UNPRINTED
    except KeyboardInterrupt:
        tell("weightload: stopped")
        return STOPPED
    except ValueError as error:  # of a setting, a device, a path, an address
        tell(f"weightload: {error}")
        return USAGE
    except SafetensorError as error:
        tell(f"weightload: {error}")
        return UNUSABLE if isinstance(error, (OSError, MemoryError)) else BROKEN
    except (OSError, MemoryError) as error:
        tell(f"weightload: {error}")
        return UNUSABLE


def _drop_output() -> None:
    """Drop what is still buffered, so that it does not raise at exit."""
    if sys.stdout is None or sys.stdout is not sys.__stdout__:
        return  # none, or somebody's object
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno())
    os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """Repeats no secrets of an address that it does not know what to do with."""

    def error(self, message: str) -> NoReturn:
        super().error(" ".join(map(shown, message.split(" "))))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="weightload",
        description="Look into safetensors checkpoints, their loading and its settings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"weightload {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (cli_inspect, cli_verify, cli_load, cli_settings):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
