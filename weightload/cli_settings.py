"""``weightload settings``: the settings in force, and their page."""

from __future__ import annotations

import argparse

from weightload import settings_page
from weightload.cli_common import OK, Commands, add_command, print_json, print_text, say


def add(commands: Commands) -> None:
    """Make the command known."""
    command = add_command(
        commands,
        "settings",
        help="show the settings in force and where each comes from",
        description="Show the settings that a load in this environment would have, and where each comes from.",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, with units and defaults")
    form.add_argument("--markdown", action="store_true", help="print the page that explains every setting")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.markdown:
        print_text(settings_page.markdown().rstrip("\n"))
    elif options.json:
        print_json(settings_page.in_force())
    else:
        for line in settings_page.in_words():
            say(line)
    return OK
