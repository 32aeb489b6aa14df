"""Which files of a directory are the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightload._base.paths import natural_key
from weightload._base.printable import printable
from weightload._checkpoint import passed_over
from weightload._checkpoint.file_names import (
    CANONICAL_STEMS,
    ENDING,
    Shard,
    family,
    is_canonical,
    shard_of,
    split_variant,
    what_it_is,
)
from weightload._checkpoint.index import INDEX_NAME, is_index, is_missing, read_index, require_shards
from weightload._checkpoint.passed_over import Aside
from weightload.errors import CheckpointError


@dataclass
class Found:
    """The files of a checkpoint, by their names alone."""

    files: Sequence[Path | str]
    """Paths, or addresses."""
    promised: Mapping[str, Path | str] = field(default_factory=dict)
    """The shard of every tensor that an index names."""
    passed_over: str = ""
    """A sentence about files of the directory that are no part of it; empty where there are none."""


class Directory:
    """A directory of which a model is wanted, of one variant or of none."""

    def __init__(self, folder: Path, variant: str | None) -> None:
        self._folder, self._variant = folder, variant or None
        self._names = sorted(os.listdir(folder), key=natural_key)
        # Names that begin with a dot are hidden, to Python's glob and so to engines too: the ._NAME that macOS puts
        # beside every NAME on file systems of others, and what programs keep for themselves.
        visible = [name for name in self._names if not name.startswith(".")]
        self._folders = [name for name in visible if name.endswith(ENDING) and os.path.isdir(folder / name)]
        self._weights = [name for name in visible if name.endswith(ENDING) and name not in self._folders]
        self._indexes = [name for name in visible if is_index(name)]
        self._stems: dict[str, tuple[str, str | None]] = {}
        families = {family(name) for name in self._weights}
        for name in self._weights:
            self._stems[name] = split_variant(family(name), self._variant, families)
        for name in self._indexes:
            match = INDEX_NAME.fullmatch(name)
            assert match
            stem, ending = split_variant(match["stem"], self._variant, families)
            self._stems[name] = stem, ending or match["before"] or match["after"]
        have = {"adapter_config": "adapter_config.json" in visible, "config": "config.json" in visible}
        stems = {self._stems[name][0] for name in self._weights}
        self._kinds = {name: what_it_is(stem, stems, **have) for name, (stem, _) in self._stems.items()}

    def find(self) -> Found:
        """The model's files.

        Raises:
            FileNotFoundError: there are none, or a shard is missing.
            CheckpointError: there are several models, or the index is bad.
        """
        index = self._choose_index()
        if index is None:
            files = self._choose_files()
            return self._found([self._folder / name for name in files], {}, "not a part of it")
        path = self._folder / index
        listed = read_index(path)
        whole = self._whole_file(index) if len(listed.missing) == len(listed.shards) else None
        if whole is not None:
            stale = Aside(index, index, "its shards are gone")
            return self._found([self._folder / whole], {}, "not a part of it", [stale])
        if listed.missing:
            whole = self._whole_file(index)
            require_shards(path, listed, f"; to load {printable(whole)} instead, pass its path" if whole else "")
        return self._found(listed.shards, listed.promised, f"not in {printable(index)}")

    def _wanted(self, names: list[str]) -> dict[str, str]:
        """Keep the names of files that may be the model, and give the stem of each."""
        return {
            name: self._stems[name][0]
            for name in names
            if self._kinds[name] is None and self._stems[name][1] == self._variant
        }

    def _choose_index(self) -> str | None:
        stems: dict[str, str] = {}
        for name, stem in self._wanted(self._indexes).items():
            stems.setdefault(stem, name)
        return self._the_one(stems, "index")

    def _choose_files(self) -> list[str]:
        families: dict[str, list[str]] = {}
        for name, stem in self._wanted(self._weights).items():
            families.setdefault(stem, []).append(name)
        if not families:
            raise self._nothing_found()
        model = self._the_one({stem: stem for stem in families if is_canonical(stem)}, "model")
        chosen = families[model] if model else [name for names in families.values() for name in names]
        chosen = _prefer_whole_file(chosen)
        self._require_all_shards(chosen)
        return sorted(chosen, key=natural_key)

    def _the_one(self, stems: dict[str, str], what: str) -> str | None:
        """The only candidate, or the only one under a canonical name."""
        for known in CANONICAL_STEMS:
            if len(stems) > 1:
                stems = {stem: name for stem, name in stems.items() if stem in known} or stems
        if len(stems) > 1:
            named = ", ".join(map(printable, sorted(stems.values())))
            raise CheckpointError(f"{self._folder}: more than one {what} here ({named}); name the one to load")
        return next(iter(stems.values()), None)

    def _require_all_shards(self, names: list[str]) -> None:
        sets: dict[tuple[str, str], tuple[Shard, set[int]]] = {}
        for name in names:
            shard = shard_of(name)
            if shard:
                sets.setdefault((shard.before, shard.behind), (shard, set()))[1].add(shard.number)
        for shard, numbers in sets.values():
            first = 0 if 0 in numbers else 1
            missing = set(range(first, first + shard.total)) - numbers if shard.total <= 100_000 else set()
            if missing:
                what = f"Shard missing ({len(missing)} of {shard.total})"
                raise FileNotFoundError(2, what, str(self._folder / shard.name(min(missing))))
        of_family: dict[str, str] = {}
        for shard, numbers in sets.values():
            name = shard.name(min(numbers))
            if len(numbers) != shard.total:
                continue  # numbers that nobody can have meant
            other = of_family.setdefault(family(name), name)
            if other != name:
                what = f"several sets of shards of one model here ({printable(other)}, {printable(name)})"
                raise CheckpointError(f"{self._folder}: {what}; pass the files of one of them")

    def _whole_file(self, index: str) -> str | None:
        """The file that has all of what an index was about."""
        for name, stem in self._wanted(self._weights).items():
            if stem == self._stems[index][0] and shard_of(name) is None and not is_missing(self._folder / name):
                return name
        return None

    def _found(
        self, files: list[Path], promised: dict[str, Path], reason: str, more: list[Aside] | None = None
    ) -> Found:
        """With what is to be told of all other files."""
        taken = {path.name for path in files if path.parent == self._folder}
        asides = [*(more or []), *self._asides(taken, reason)]
        told = passed_over.sentence(str(self._folder), [path.name for path in files], asides) if asides else ""
        return Found(files, promised, told)

    def _asides(self, taken: set[str], reason: str) -> list[Aside]:
        stems = {self._stems[name][0] for name in taken if name in self._stems}
        asides = []
        for name in self._weights:
            stem, variant = self._stems[name]
            if name in taken:
                continue
            if self._variant is not None and variant != self._variant and stem in stems and self._kinds[name] is None:
                continue  # the caller's own words have chosen between them
            why = self._kinds[name] or self._about_variant(variant)
            if not why and stem in stems and shard_of(name) and not any(shard_of(other) for other in taken):
                why = "shards beside a whole file"
            asides.append(Aside(name, f"{stem}.{variant}", why or reason))
        asides += [aside for aside in passed_over.other_things(str(self._folder), self._names) if aside.group == "case"]
        return asides

    def _about_variant(self, variant: str | None) -> str:
        if variant == self._variant:
            return ""
        return f"variant={variant!r}" if variant else "of no variant"

    def _nothing_found(self) -> FileNotFoundError:
        folder = str(self._folder)
        which = f" of variant {self._variant!r}" if self._variant else ""
        asides = self._asides(set(), "not of this variant")
        asides = [aside for aside in asides if aside.group != "case"]
        asides += [Aside(name, name, "an index: pass its path") for name in self._indexes]
        asides += [Aside(name, name, "a directory: pass its path") for name in self._folders]
        asides += passed_over.other_things(folder, self._names)
        said = []
        if asides:
            said.append(f"there is {passed_over.in_words(asides)}")
        if any(name in self._weights for name in (aside.name for aside in asides)):
            said.append("to load that, pass the variant or the path of the file itself")
        about = passed_over.about_folder(folder)
        if about:
            said.append(about)
        what = f"No safetensors files of a model{which} in the directory"
        return FileNotFoundError(2, "; ".join([what, *said]), folder)


def _prefer_whole_file(names: list[str]) -> list[str]:
    """Where a family has both a whole file and shards (as a re-save leaves them), the whole file."""
    whole = [name for name in names if shard_of(name) is None]
    families = {family(name) for name in whole}
    return [name for name in names if name in whole or family(name) not in families]
