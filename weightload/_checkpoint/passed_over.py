"""Files beside a checkpoint that are no part of it: how they are reported, also in errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from weightload._base.handlers import forgiven, pass_on
from weightload._base.printable import printable
from weightload._checkpoint.file_names import ENDING

MOST_NAMED = 5  # of the groups of files in one sentence
MOST_FOLDERS = 50  # that are looked into for an error's sake

# Weights that are not safetensors, by their endings, and downloads that have not ended.
_OTHER_FORMATS = re.compile(
    r"\.(bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|npz|pkl|flashpack|tflite)(\.index(\.\w+)?\.json)?$", re.I
)
# Shards as they are called, and no ending.
_UNENDED = re.compile(r"\.safetensors[-_.][^.]*$|[-_.][0-9]+[-_]of[-_][0-9]+$", re.I)
_UNFINISHED = re.compile(r"\.(incomplete|part|partial|tmp|download|crdownload|aria2)$", re.I)


class PassedOverWarning(UserWarning):
    """Files of a directory that ``resolve_safetensors_files`` did not take for a part of the model."""


class Aside(NamedTuple):
    """A file that was passed over."""

    name: str
    group: str
    """Files of one group are told as one."""
    reason: str
    """A description of it, or the argument to pass for it."""


def in_words(asides: Iterable[Aside]) -> str:
    """Names and reasons: ``a (an adapter), model.fp16-1 and 3 more (variant='fp16')``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for aside in asides:
        groups.setdefault((aside.group, aside.reason), []).append(aside.name)
    said = []
    for (_, reason), names in list(groups.items())[:MOST_NAMED]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        said.append(f"{printable(names[0])}{more} ({reason})")
    left = sum(len(names) for names in list(groups.values())[MOST_NAMED:])
    if left:
        said.append(f"{left} other file{'s' * (left > 1)}")
    return ", ".join(said)


def sentence(folder: str, taken: Sequence[str], asides: Sequence[Aside]) -> str:
    """The report on a directory's files that were not taken."""
    more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
    said = f"{printable(folder)}: took {printable(taken[0])}{more} and passed over {in_words(asides)}"
    if all(not aside.name.endswith(ENDING) for aside in asides):  # an index whose shards are gone
        return said
    return f"{said}; to load what was passed over, pass the variant or the path of the file itself"


def other_things(folder: str, names: Iterable[str]) -> list[Aside]:
    """Describes a directory that has no model in safetensors files."""
    found = []
    for name in names:
        if name.startswith("."):
            if name.endswith(ENDING):
                found.append(Aside(name, "hidden", "a hidden file or a sidecar"))
        elif _UNFINISHED.search(name):
            found.append(Aside(name, "unfinished", "a download that has not ended"))
        elif _OTHER_FORMATS.search(name):
            what = "another format: convert it to safetensors, or download the model's safetensors files"
            found.append(Aside(name, _OTHER_FORMATS.search(name)[1].lower(), what))  # type: ignore[index]
        elif name.lower().endswith(ENDING) and not name.endswith(ENDING):
            found.append(Aside(name, "case", f"ends in {name[-len(ENDING) :]}: pass the path of the file itself"))
        elif _UNENDED.search(name):
            what = f"does not end in {ENDING}: rename it, or pass the paths of the files themselves"
            found.append(Aside(name, "ending", what))
    return found


def folders_with_models(folder: str) -> list[str]:
    """Names of the folders below that have safetensors files: the components of a pipeline."""
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            below = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        for name in below[:MOST_FOLDERS]:
            inside = os.listdir(os.path.join(folder, name))
            if any(file.endswith(ENDING) and not file.startswith(".") for file in inside):
                found.append(name)
    except OSError as failed:
        pass_on(failed)
        # a hint less
    return found


def about_folder(folder: str) -> str:
    """The folders to pass in place of a directory whose models are below it; empty if there are none."""
    snapshots = os.path.join(folder, "snapshots")
    if os.path.isdir(snapshots):
        return f"it is a model's root in a hub cache: pass {printable(_snapshot(folder, snapshots))}"
    below = folders_with_models(folder)
    if below:
        named = ", ".join(repr(name) for name in below[:MOST_NAMED]) + ", ..." * (len(below) > MOST_NAMED)
        return f"there are some in folders below: pass subfolder= ({named})"
    return ""


def _snapshot(folder: str, snapshots: str) -> str:
    """The snapshot that the branch `main` stands for, if it is there, or the only one."""
    only: list[str] = []
    with forgiven(OSError):
        only = os.listdir(snapshots)
        with open(os.path.join(folder, "refs", "main"), "rb") as file:
            commit = file.read(100).decode("ascii", "replace").strip()
        if commit in only:
            return os.path.join(snapshots, commit)
    return os.path.join(snapshots, only[0] if len(only) == 1 else "REVISION")


def about_missing(path: str) -> str:
    """Paths that may be meant by one that is not there; empty if nothing comes to mind."""
    if (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)
        and not path.endswith(ENDING)
        and not os.path.isdir(path.split("/")[0])
    ):
        return " (if this is a model's name on a hub: download it first, then pass the directory)"
    return ""
