"""Writes weightload/_C.pyi from the built extension; with --check compares it with the committed one instead."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parent.parent / "weightload" / "_C.pyi"

# What the generator cannot know: element types of containers built by hand.
MORE_PRECISELY = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "def names(self) -> list:": "def names(self) -> list[str]:",
    "def tensors(self) -> list:": "def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:",
    "def metadata(self) -> typing.Any:": "def metadata(self) -> dict[str, str] | None:",
    "def __iter__(self) -> typing.Any:": "def __iter__(self) -> typing_extensions.Self:",
    "def __next__(self) -> typing.Any:": "def __next__(self) -> tuple[str, torch.Tensor]:",
    "def device_counts(self) -> dict:": "def device_counts(self) -> dict[str, typing.Any]:",
    "def counts(self) -> dict:": "def counts(self) -> dict[str, typing.Any]:",
    "[collections.abc.Sequence[int]] | None) -> list:": (
        "[collections.abc.Sequence[int]] | None) -> list[tuple[str, list[tuple[int, int]]]]:"
    ),
    "files: list,": "files: list[CheckpointFile],",
    "places: list,": "places: list[torch.Tensor | None],",
    "def __exit__(self, *args) -> None:": "def __exit__(self, *args: object) -> None:",
    "import typing\n": "import typing\n\nimport torch\nimport typing_extensions\n",
}


def generate() -> str:
    """The stub of weightload._C."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "weightload._C", "--exit-code", "-o", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        text = Path(folder, "weightload", "_C.pyi").read_text()
    text = re.sub(r"    def __reduce(_ex)?__\(.*\n +\.\.\.\n", "", text)  # object's own are typed otherwise
    for vague, precise in MORE_PRECISELY.items():
        assert vague in text, f"{vague!r} is not in the stub any more"
        text = text.replace(vague, precise)
    for command in (["check", "--fix", "-q", "--select", "I,F"], ["format", "-q"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    """Command line."""
    new = generate()
    if "--check" not in sys.argv:
        TARGET.write_text(new)
        return 0
    old = TARGET.read_text()
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "committed", "generated"))
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
