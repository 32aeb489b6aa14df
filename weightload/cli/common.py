"""Shared by all commands: printing, exit codes, the arguments that name a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

from weightload._base import terminal
from weightload._base.printable import printable
from weightload._checkpoint.resolve import resolve_and_tell

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

OK, BROKEN, USAGE, UNUSABLE, UNPRINTED, STOPPED = 0, 1, 2, 3, 4, 130

EPILOG = """\
PATH is a safetensors file, an index (*.safetensors.index.json) or a directory, or the
address of one on a server (s3://, gs://, az://, https://, hf://).

exit codes:
  0    all is well
  1    the checkpoint breaks a rule of the format, or its bytes differ
  2    wrong usage, or a setting that is not allowed
  3    PATH, or a file it calls for, is missing or cannot be read
  4    what it prints cannot be written
  130  stopped by Ctrl-C
"""


class Unprinted(Exception):
    """Standard output cannot be written: the disk is full, say."""


def add_command(commands: Commands, name: str, help: str, description: str) -> argparse.ArgumentParser:
    """A command's parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=help, description=description, epilog=EPILOG, formatter_class=formatter)


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """The arguments that name a checkpoint."""
    command.add_argument("path", metavar="PATH", help="a file, an index or a directory")
    command.add_argument("--subfolder", help="a folder below PATH, such as diffusers' transformer")
    command.add_argument("--variant", help="load the files of this variant, such as fp16")


def say(line: str) -> None:
    """Print a line. Names out of files may hold anything: what would break the line or steer a terminal is escaped."""
    print_text(printable(line))


def tell(line: str) -> None:
    """Say a line on stderr, if there is one."""
    terminal.to_stderr(printable(line))


def resolve(options: argparse.Namespace) -> list[str]:
    """The files that the arguments name; what was passed over is told on stderr."""
    return resolve_and_tell(options.path, options.subfolder, options.variant, tell_warning)


def tell_warning(text: str) -> None:
    """Tell what a person should know."""
    tell(f"weightload: {text}")


def print_text(text: str) -> None:
    """Print text of our own making, of any number of lines.

    Raises:
        BrokenPipeError: nobody reads any more.
        Unprinted: it cannot be written for another reason.
    """
    with _printing():
        print(text)


def flush() -> None:
    """Write what is printed and still buffered; raises as ``print_text``."""
    with _printing():
        if sys.stdout is not None:
            sys.stdout.flush()


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise Unprinted(f"cannot print: {error}") from error


def print_json(value: Any) -> None:
    """Print JSON, which escapes by itself what would steer a terminal."""
    print_text(json.dumps(value, indent=2))


def bytes_in_words(count: int) -> str:
    """A number of bytes in decimal units."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
