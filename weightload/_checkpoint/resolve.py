"""resolve_safetensors_files: from what people call a model to the list of its safetensors files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from weightload import _C
from weightload._base import paths
from weightload._base.addresses import below, is_address, shown
from weightload._base.paths import natural_key
from weightload._checkpoint import passed_over
from weightload._checkpoint.directory import Directory, Found
from weightload._checkpoint.duplicates import Owners, refusal
from weightload._checkpoint.index import is_index, is_missing, read_index, require_shards
from weightload._checkpoint.passed_over import PassedOverWarning
from weightload._checkpoint.selection import open_files
from weightload.errors import CheckpointError, located

__all__ = ["check_contents", "find_files", "natural_key", "resolve_and_tell", "resolve_safetensors_files"]


def resolve_safetensors_files(
    model_path: paths.Paths, subfolder: paths.Path | None = None, variant: str | None = None
) -> list[str]:
    """Find the safetensors files of a checkpoint, in the order they are to be loaded in.

    Args:
        model_path: a file; several files; an index (``*.safetensors.index.json``); or a directory. In a directory
            an index decides which files belong to the checkpoint (if its shards are gone and a whole file of its name
            is there, that file); without one, a model under the names of transformers or diffusers; without that,
            every safetensors file that is no adapter, state of a trainer or consolidated copy, by the words of its
            name. Hidden files are never a part. Shards are sorted by number (2 before 10).
        subfolder: a folder below the directory, such as diffusers' ``"transformer"``.
        variant: such as ``"fp16"``: only files of this variant; without it, only files of none.

    Returns:
        Paths, each of an existing file. When there is more than one, their headers have been read: no tensor occurs
        twice, unless an index says which file it is taken from, and every shard holds the tensors that the index
        promises of it.

    Warns:
        PassedOverWarning: once, with one sentence, if the directory has other safetensors files: which, and what to
            pass to load them. Files of other variants than the one that was asked for are not mentioned.

    Raises:
        FileNotFoundError: the path, a shard that an index or a shard's own name calls for, or any safetensors file
            at all is missing; the message says what is there instead. Model names of a hub are not looked up:
            download first, then pass the directory.
        CheckpointError: an index that is malformed or names files outside its directory; a directory that holds
            several models.
        DuplicateTensor: a tensor occurs in two files, and no index beside them says which of them has it.
        HeaderError: a file breaks a rule of the format.
        TypeError: something that is no path.
    """
    found = find_files(model_path, subfolder, variant)
    check_contents(found)
    if found.passed_over:
        warnings.warn(found.passed_over, PassedOverWarning, stacklevel=2)
    return [str(path) for path in found.files]


def resolve_and_tell(
    model_path: paths.Paths, subfolder: paths.Path | None, variant: str | None, tell: Callable[[str], object]
) -> list[str]:
    """``resolve_safetensors_files`` that tells what was passed over in its caller's way."""
    found = find_files(model_path, subfolder, variant)
    if found.passed_over:
        tell(found.passed_over)
    check_contents(found)
    return [str(path) for path in found.files]


def find_files(model_path: paths.Paths, subfolder: paths.Path | None = None, variant: str | None = None) -> Found:
    """The files by their names alone, none of them opened."""
    if not isinstance(model_path, (str, bytes, os.PathLike)):
        if subfolder or variant:
            raise ValueError("subfolder and variant go with a directory, not with a list of files")
        found = Found([item if is_address(item) else Path(item) for item in paths.path_list(model_path)])
    else:
        text = paths.as_text(model_path)
        if not text:
            raise FileNotFoundError(2, "No such file or directory", text)  # pathlib takes it for the current one
        inside = paths.as_text(subfolder) if subfolder else ""
        _require_inside(inside)
        if is_address(text):
            from weightload._checkpoint.mirror import find_remote, in_cache  # here: most never need it

            address = below(text, inside) if inside else text
            text, inside = in_cache(address), ""
            if is_address(text):
                return find_remote(text, variant)
        path = Path(text)
        if inside:
            path = _below(path, inside)
        if path.is_dir():
            found = Directory(path, variant).find()
        elif is_index(path.name):
            index = read_index(path)
            require_shards(path, index)
            found = Found(index.shards, index.promised)
        else:
            found = Found([path])
    for file in found.files:
        if isinstance(file, Path):
            _require_file(file)
    return found


def _require_inside(subfolder: str) -> None:
    if os.path.isabs(subfolder):
        raise ValueError(f"subfolder {subfolder!r}: must be a folder below the directory, not an absolute path")
    if ".." in Path(subfolder).parts:
        raise ValueError(f"subfolder {subfolder!r}: must be a folder below the directory, without '..'")


def _below(folder: Path, subfolder: str) -> Path:
    path = folder / subfolder
    if folder.is_dir() and is_missing(path):
        about = passed_over.about_folder(str(folder))
        raise FileNotFoundError(2, f"No such folder{about and '; '}{about}", str(path))
    return path


def _require_file(path: Path) -> None:
    if is_missing(path):
        hint = " (the link's target is missing)" if path.is_symlink() else passed_over.about_missing(str(path))
        raise FileNotFoundError(2, f"No such file or directory{hint}", str(path))


def check_contents(found: Found) -> None:
    """Refuse tensors that occur in two files, unless an index says which has them, and shards without the tensors that
    the index promises of them."""
    if len(found.files) < 2 and not found.promised:
        return
    opened = open_files(found.files)
    try:
        repeated = _C.repeated_tensors(opened, None)
        # Only the names are kept: an exception's traceback would keep open files open.
        names_of_files = [file.names() for file in opened]
        names = [file.path for file in opened]
    finally:
        opened.clear()
    owners = Owners(names)
    for name, places in repeated:
        at = [number for number, _ in places]
        given = found.promised.get(name)
        if (given is None or given not in (found.files[number] for number in at)) and owners.decide(name, at) is None:
            raise refusal(name, names[at[0]], names[at[1]])
    _check_promises(found, names_of_files)


def _check_promises(found: Found, names_of_files: list[list[str]]) -> None:
    if not found.promised:
        return
    have = {path: set(names) for path, names in zip(found.files, names_of_files, strict=True)}
    for name, path in found.promised.items():
        if name not in have[path]:
            elsewhere = next((other for other, names in have.items() if name in names), None)
            where = f"it is in {shown(str(elsewhere))}" if elsewhere else "no shard has it"
            what = f"{shown(str(path))}: tensor `{name}` is not in this shard, as the index says; {where}"
            raise located(CheckpointError(what), shown(str(path)), name)
