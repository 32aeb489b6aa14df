"""``weightload settings``: the settings in force, and where each comes from."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from weightload import settings
from weightload.cli.common import OK, Commands, add_command, print_json, say

UNITS = (("MiB", 1 << 20), ("KiB", 1 << 10))


def add(commands: Commands) -> None:
    """Make the command known."""
    command = add_command(
        commands,
        "settings",
        help="show the settings in force and where each comes from",
        description="Show the settings that a load in this environment would have, and where each comes from.",
    )
    command.add_argument("--json", action="store_true", help="print JSON, with units and defaults")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.json:
        print_json(in_force())
    else:
        for line in in_words():
            say(line)
    return OK


def in_force() -> dict[str, dict[str, Any]]:
    """Return each setting's value in this process now, where that comes from, its unit, default and variable.

    ``threads`` has the number that a load would start, too.

    Raises:
        ValueError: a value that is not allowed.
    """
    now, origins = settings.current(), settings.origins()
    found: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(now):
        found[field.name] = {
            "value": getattr(now, field.name),
            "from": origins[field.name],
            "default": field.default,
            "unit": field.metadata["unit"],
            "variable": settings.variable(field.name),
            "loads": field.metadata["loads"],
        }
    found["threads"]["here"] = now.thread_count()
    return found


def in_words() -> list[str]:
    """``in_force`` as lines of a table."""
    rows = []
    for name, about in in_force().items():
        value = f"0 ({about['here']} here)" if (name, about["value"]) == ("threads", 0) else shown(name, about["value"])
        origin = about["variable"] if about["from"] == "environment" else about["from"]
        rows.append((name, value, about["loads"], origin))
    rows.insert(0, ("setting", "value", "loads", "from"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


IN_WORDS: dict[tuple[str, int], str] = {
    ("threads", 0): "0 (the CPUs of the process)",
    ("requests", 0): f"0 ({settings.REQUESTS_AT_FIRST} to {settings.MOST_REQUESTS}, as many as pay)",
}


def shown(name: str, value: int | str) -> str:
    """A value as people read it: whole MiB or KiB as such, and 0 in words where it means another number."""
    if isinstance(value, str):
        return value
    if (name, value) in IN_WORDS:
        return IN_WORDS[name, value]
    if not name.endswith("bytes"):
        return str(value)
    for unit, size in UNITS:
        if value and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value} bytes"
