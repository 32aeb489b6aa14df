"""Which of a server's files are a checkpoint: decided as for a directory, on empty files of the same names."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from weightload._base.addresses import below, folder_of, is_hub, name_of, shown
from weightload._base.handlers import forgiven
from weightload._checkpoint.directory import Directory, Found
from weightload._checkpoint.duplicates import remember
from weightload._checkpoint.file_names import CANONICAL_STEMS, ENDING
from weightload._checkpoint.index import is_index, read_index
from weightload._remote import hub, names
from weightload.errors import WeightLoadError, located

MOST_NAME_BYTES = 255


in_cache = hub.local


def find_remote(address: str, variant: str | None) -> Found:
    """The files of a checkpoint at an address: that of a file, of an index, or of what they are below.

    Raises:
        As ``resolve_safetensors_files``; and what the server answers, as an ``OSError`` or a ``ReadError``.
    """
    if is_hub(address):
        address = hub.pinned(address)
    name = name_of(address)
    if name.endswith(ENDING):
        return Found([address])
    index = name if is_index(name) else None
    folder = folder_of(address) if index else address
    if index:
        content = names.content(address)
        there = dict.fromkeys(names.shards_in(content), b"") | {index: content}
    else:
        there = names.names_below(address, is_index, _usual_names(variant))
    with tempfile.TemporaryDirectory(prefix="weightload-") as temporary:
        mirror = Path(temporary)
        with _told_of(address, folder, mirror):
            _make(mirror, there)
            if index:
                listed = read_index(mirror / index)
                found = Found(listed.shards, listed.promised)
            else:
                found = Directory(mirror, variant).find()
        addresses = {path: below(folder, Path(path).relative_to(mirror).as_posix()) for path in found.files}
        if found.promised:
            remember(
                shown(folder).rstrip("/"), {tensor: shown(addresses[path]) for tensor, path in found.promised.items()}
            )
        return Found(
            list(addresses.values()),
            {tensor: addresses[path] for tensor, path in found.promised.items()},
            found.passed_over.replace(str(mirror), shown(folder).rstrip("/")),
        )


def _usual_names(variant: str | None) -> Iterator[str]:
    """The names that a web server is asked for."""
    for stem in (stem for stems in CANONICAL_STEMS for stem in stems):
        yield f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
        yield f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _make(folder: Path, there: dict[str, bytes]) -> None:
    for name, content in there.items():
        pure = PurePosixPath(name)
        plain = name == str(pure) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
        if not plain or len(name.encode("utf-8", "replace")) > MOST_NAME_BYTES:
            continue  # no name that a file of a checkpoint has; an index with it is refused when it is read
        path = folder / pure
        with forgiven(OSError, UnicodeError):  # names that one folder cannot have together
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@contextlib.contextmanager
def _told_of(address: str, folder: str, mirror: Path) -> Iterator[None]:
    """Errors about the mirror's files name the server's instead."""

    def said(text: object) -> str:
        return str(text).replace(str(mirror), shown(folder).rstrip("/"))

    try:
        yield
    except WeightLoadError as error:
        raise located(type(error)(said(error)), said(error.filename or shown(address))) from None
    except OSError as error:
        raise type(error)(error.errno, said(error.strerror), said(error.filename or shown(address))) from None
