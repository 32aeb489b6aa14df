"""Index files (``*.safetensors.index.json``): which tensor is in which shard."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from weightload._base.handlers import pass_on
from weightload._base.paths import natural_key
from weightload.errors import CheckpointError, located

# model.safetensors.index.json, and with a variant: model.safetensors.index.fp16.json (transformers),
# model.safetensors.fp16.index.json and model.fp16.safetensors.index.json (diffusers, by age).
INDEX_NAME = re.compile(r"(?P<stem>.+)\.safetensors(\.(?P<before>[^.]+))?\.index(\.(?P<after>[^.]+))?\.json", re.S)

# An index of a header's largest size (100,000,000 bytes) names a million tensors. Parsed, JSON takes up to 25 times
# its size in memory.
MAX_INDEX_BYTES = 100_000_000
MAX_PATH_BYTES = 4096  # the kernel's PATH_MAX
MAX_SHOWN = 100  # characters of a refused name in a message

# Seconds. The kernel breaks another process's lease (Samba, an NFS server) after /proc/sys/fs/lease-break-time, 45 s by
# default; the opening that began it is answered with EAGAIN until then.
MOST_FOR_LEASE = 60
BETWEEN_TRIES = 0.005


def is_index(name: str) -> bool:
    """Whether a file's name is that of an index."""
    return INDEX_NAME.fullmatch(name) is not None


def is_missing(path: Path) -> bool:
    """Whether nothing is there. Other errors on the way (a link loop, no permission) are the system's ``OSError``."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as failed:
        pass_on(failed)
        return True
    return False


@dataclass
class Index:
    """The content of an index."""

    shards: list[Path]
    """In natural order, each below the index's directory; one file is there once, by whatever names."""
    missing: list[Path]
    """Those of them that are not there."""
    promised: dict[str, Path]
    """The shard of every tensor."""


def read_index(path: Path) -> Index:
    """Read an index, and look whether its shards are there.

    Raises:
        FileNotFoundError: the index is missing.
        CheckpointError: the index is malformed, or names a file outside its directory.
    """
    weight_map = shards_of_tensors(path)
    missing: list[Path] = []
    of_file: dict[tuple[int, int], Path] = {}
    one: dict[Path, Path] = {}
    for shard in sorted(set(weight_map.values()), key=lambda shard: natural_key(str(shard))):
        try:
            status = shard.stat()
        except (FileNotFoundError, NotADirectoryError) as failed:
            pass_on(failed)
            missing.append(shard)
            one[shard] = shard
        else:
            # Links of a hub's cache lead two names to one blob where the contents are the same.
            one[shard] = of_file.setdefault((status.st_dev, status.st_ino), shard)
    promised = {tensor: one[shard] for tensor, shard in weight_map.items()}
    return Index(list(dict.fromkeys(one.values())), missing, promised)


def require_shards(path: Path, index: Index, more: str = "") -> None:
    """Raise ``FileNotFoundError``, with ``more`` to say, if a shard is missing."""
    if index.missing:
        what = f"Shard missing ({len(index.missing)} of {len(index.shards)} that {path.name} names{more})"
        raise FileNotFoundError(2, what, str(index.missing[0]))


def shards_of_tensors(path: Path) -> dict[str, Path]:
    """The shard that an index gives each tensor to, whether it is there or not; see ``read_index``."""
    weight_map = _weight_map(path)
    root = os.path.realpath(path.parent)
    # Several spellings (`./a`, `a`) are one path.
    paths = {name: _shard_path(path, root, name) for name in dict.fromkeys(weight_map.values())}
    return {tensor: paths[name] for tensor, name in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    text = bytes_of_regular_file(path)
    _recognise_other_files(text, path)
    try:
        # The hook sees every object of the file, and duplicates before a dict swallows them.
        content = json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, path))
    except (ValueError, RecursionError) as problem:
        pass_on(problem)
        raise _refuse(path, f"is not JSON: {problem}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refuse(path, "has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise _refuse(path, f"weight_map gives no file name for tensor `{tensor}`")
    return weight_map


def _recognise_other_files(text: bytes, path: Path) -> None:
    """Downloads that went wrong leave these behind under the index's name."""
    if text.startswith(b"version https://git-lfs"):
        raise _refuse(path, "is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if text.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        raise _refuse(path, "is an HTML or XML page, not the file itself; download it again")


def bytes_of_regular_file(path: Path) -> bytes:
    """The bytes of a regular file of bounded size, of one state of it: an index is as hostile as a header."""
    _require_regular(path, path.stat())  # opening a device may do something, and a FIFO waits for a writer
    descriptor = _open(path)
    with open(descriptor, "rb") as file:
        before = os.fstat(descriptor)
        _require_regular(path, before)
        if before.st_size > MAX_INDEX_BYTES:
            raise _refuse(path, f"is too large for an index: {before.st_size} bytes, more than {MAX_INDEX_BYTES}")
        content = file.read(before.st_size + 1)
        after = os.fstat(descriptor)
    if len(content) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        raise _refuse(path, "was changed while it was read")
    return content


def _open(path: Path) -> int:
    """A descriptor for reading. Where another process has a lease on the file, it waits until that has let go."""
    deadline = time.monotonic() + MOST_FOR_LEASE
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except BlockingIOError as failed:
            pass_on(failed)
            if time.monotonic() > deadline:
                raise
            time.sleep(BETWEEN_TRIES)


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _refuse(path, "is not a regular file")


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _refuse(path, f"`{twice}` occurs twice")
    return content


def _shard_path(index: Path, root: str, name: str) -> Path:
    """The path of a shard, which must lie below the index's directory.

    The file itself may be a link that leads elsewhere, as in a hub's cache; the folders on the way may not.
    """
    _require_path(index, name)
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise _refuse(index, f"names a file outside its directory: {name!r}")
    if not name.endswith(".safetensors"):
        raise _refuse(index, f"names a file that is not a safetensors file: {name!r}")
    path = index.parent.joinpath(*pure.parts)
    if os.path.commonpath([root, os.path.realpath(path.parent)]) != root:
        raise _refuse(index, f"names a file outside its directory: {name!r}")
    return path


def _require_path(index: Path, name: str) -> None:
    """Refuse what cannot be a path at all, before anything walks along it."""
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        raise _refuse(index, f"names a file with half a character: {name[:MAX_SHOWN]!r}") from None
    if length > MAX_PATH_BYTES:
        raise _refuse(index, f"names a file with a path of {length} bytes: {name[:MAX_SHOWN]!r}...")


def _refuse(path: Path, what: str) -> CheckpointError:
    return located(CheckpointError(f"{path}: {what}"), str(path))
