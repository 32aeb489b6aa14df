"""resolve_safetensors_files: from what people call a model to the list of its safetensors files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from weightload.errors import CheckpointError, DuplicateTensor, located
from weightload.index import INDEX_NAME, is_index, is_missing, read_index

# The names under which transformers and diffusers save a model. Where one of them is present, other files beside
# it are extras.
CANONICAL_STEMS = ("model", "diffusion_pytorch_model")

# Files that lie beside a model's weights and are not part of them: adapters, and the original-format copy that some
# publishers ship next to the sharded one.
EXTRAS = re.compile(
    r"^(consolidated|adapter_model|pytorch_lora_weights|optimizer|scheduler|scaler|rng_state)\b|lora", re.I
)

_SHARD = re.compile(r"^(?P<stem>.+?)-(?P<number>[0-9]+)-of-(?P<count>[0-9]+)(?P<rest>.*)$")


def resolve_safetensors_files(
    model_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    subfolder: str | None = None,
    variant: str | None = None,
) -> list[str]:
    """Find the safetensors files of a checkpoint, in the order they are to be loaded in.

    Args:
        model_path: a file; a list of files; an index (``*.safetensors.index.json``); or a directory. In a directory
            an index decides which files belong to the checkpoint; without one, a model under the names of
            transformers or diffusers; without that, every safetensors file that is no adapter, optimizer state or
            ``consolidated*`` copy. Shards are sorted by number (2 before 10).
        subfolder: a folder below the directory, such as diffusers' ``"transformer"``.
        variant: such as ``"fp16"``: only files of this variant; without it, only files of none.

    Returns:
        Paths, each of an existing file. When there is more than one, their headers have been read: no tensor occurs
        twice, and every shard holds the tensors that the index promises of it.

    Raises:
        FileNotFoundError: the path, a shard that an index or a shard's own name calls for, or any safetensors file
            at all is missing. Model names of a hub are not looked up: download first, then pass the directory.
        CheckpointError: an index that is malformed or names files outside its directory; a directory that holds
            several models.
        DuplicateTensor: a tensor occurs in two files.
        HeaderError: a file breaks a rule of the format.
    """
    found, promised = find_files(model_path, subfolder, variant)
    if len(found) > 1 or promised:
        check_contents(found, promised)
    return [str(path) for path in found]


def find_files(
    model_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    subfolder: str | None = None,
    variant: str | None = None,
) -> tuple[list[Path], dict[str, Path]]:
    """The files by their names alone, none of them opened, and the shard of every tensor that an index names."""
    promised: dict[str, Path] = {}
    if isinstance(model_path, (str, os.PathLike)):
        path = Path(model_path, subfolder) if subfolder else Path(model_path)
        if path.is_dir():
            found, promised = _in_directory(path, variant)
        elif is_index(path.name):
            found, promised = read_index(path)
        else:
            found = [path]
    else:
        if subfolder or variant:
            raise ValueError("subfolder and variant go with a directory, not with a list of files")
        found = [Path(item) for item in model_path]
    for path in found:
        _require_file(path)
    return found, promised


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares runs of digits as numbers, so that ``shard-2`` comes before ``shard-10``."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # By length and text, not by int(): that refuses numbers of thousands of digits, and an index may have such names.
    return [(0, *_number(part)) if "0" <= part[0] <= "9" else (1, 0, part) for part in parts]


def _number(digits: str) -> tuple[int, str]:
    """A key that orders runs of digits as the numbers they are, and equal numbers by their zeros."""
    significant = digits.lstrip("0")
    return len(significant), f"{significant} {digits}"


def _require_file(path: Path) -> None:
    if is_missing(path):
        hint = " (the link's target is missing)" if path.is_symlink() else ""
        raise FileNotFoundError(2, f"No such file or directory{hint}", str(path))


def _in_directory(folder: Path, variant: str | None) -> tuple[list[Path], dict[str, Path]]:
    names = sorted(os.listdir(folder), key=natural_key)
    index = _choose_index([name for name in names if is_index(name)], folder, variant)
    if index is not None:
        return read_index(folder / index)
    files = [name for name in names if name.endswith(".safetensors") and not EXTRAS.search(name)]
    return [folder / name for name in _choose_files(files, folder, variant)], {}


def _choose_index(names: list[str], folder: Path, variant: str | None) -> str | None:
    stems: dict[str, str] = {}
    for name in names:
        match = INDEX_NAME.match(name)
        assert match
        stem, found = _split_variant(match["stem"], variant, names)
        found = found or match["before"] or match["after"]
        if found == variant and not EXTRAS.search(stem):
            stems.setdefault(stem, name)
    return _the_one(stems, folder, "index")


def _choose_files(names: list[str], folder: Path, variant: str | None) -> list[str]:
    families: dict[str, list[str]] = {}
    for name in names:
        stem, found = _split_variant(_family(name), variant, [_family(other) + "." for other in names])
        if found == variant:
            families.setdefault(stem, []).append(name)
    if not families:
        which = f" of variant {variant!r}" if variant else ""
        raise FileNotFoundError(2, f"No safetensors files{which} in the directory", str(folder))
    canonical = {stem: stem for stem in families if stem in CANONICAL_STEMS}
    model = _the_one(canonical, folder, "model")
    chosen = families[model] if model else [name for family in families.values() for name in family]
    chosen = _prefer_whole_file(chosen)
    _require_all_shards(chosen, folder)
    return sorted(chosen, key=natural_key)


def _the_one(stems: dict[str, str], folder: Path, what: str) -> str | None:
    """The only candidate, or the only one under a canonical name."""
    if len(stems) > 1:
        stems = {stem: name for stem, name in stems.items() if stem in CANONICAL_STEMS} or stems
    if len(stems) > 1:
        raise CheckpointError(
            f"{folder}: more than one {what} here ({', '.join(sorted(stems.values()))}); name the one to load"
        )
    return next(iter(stems.values()), None)


def _family(name: str) -> str:
    """The name without ending and shard number: ``model.fp16-00001-of-00002.safetensors`` is ``model.fp16``."""
    stem = name.removesuffix(".safetensors")
    match = _SHARD.match(stem)
    return match["stem"] + match["rest"] if match else stem


def _split_variant(stem: str, variant: str | None, others: list[str]) -> tuple[str, str | None]:
    """Split ``model.fp16`` into stem and variant.

    A dot alone makes no variant (``v1.5`` is a name): the ending counts as one when it was asked for, when what is
    before it is a canonical name, or when another file has that name without it.
    """
    base, dot, ending = stem.rpartition(".")
    if not dot:
        return stem, None
    known = base in CANONICAL_STEMS or any(
        other.startswith(base + ".") and not other.startswith(stem) for other in others
    )
    return (base, ending) if ending == variant or known else (stem, None)


def _prefer_whole_file(names: list[str]) -> list[str]:
    """Where a family has both a whole file and shards (as a re-save leaves them), the whole file."""
    whole = [name for name in names if not _SHARD.match(name)]
    families = {_family(name) for name in whole}
    return [name for name in names if name in whole or _family(name) not in families]


def _require_all_shards(names: list[str], folder: Path) -> None:
    present: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        match = _SHARD.match(name)
        if match:
            present.setdefault((match["stem"], match["count"], match["rest"]), set()).add(int(match["number"]))
    for (stem, count, rest), numbers in present.items():
        first = 0 if 0 in numbers else 1
        missing = set(range(first, first + int(count))) - numbers if int(count) <= 100_000 else set()
        if missing:
            name = f"{stem}-{min(missing):0{len(count)}d}-of-{count}{rest}"
            raise FileNotFoundError(2, f"Shard missing ({len(missing)} of {int(count)})", str(folder / name))


def check_contents(files: list[Path], promised: dict[str, Path]) -> None:
    """Refuse tensors that occur in two files, and shards without the tensors that the index promises of them."""
    from weightload.selection import open_files

    owner: dict[str, Path] = {}
    # Only the names are kept: an exception's traceback would keep open files open.
    names_of_files = [file.names() for file in open_files(files)]
    for path, names in zip(files, names_of_files, strict=True):
        for name in names:
            if name in owner:
                raise located(DuplicateTensor(f"{path}: tensor `{name}` is in {owner[name]} too"), str(path), name)
            owner[name] = path
    for name, path in promised.items():
        if owner.get(name) != path:
            where = f"it is in {owner[name]}" if name in owner else "no shard has it"
            what = f"{path}: tensor `{name}` is not in this shard, as the index says; {where}"
            raise located(CheckpointError(what), str(path), name)
