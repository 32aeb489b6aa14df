"""Index files (``*.safetensors.index.json``): which tensor is in which shard."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from weightload.errors import CheckpointError

# model.safetensors.index.json, and with a variant: model.safetensors.index.fp16.json (transformers),
# model.safetensors.fp16.index.json and model.fp16.safetensors.index.json (diffusers, by age).
INDEX_NAME = re.compile(r"^(?P<stem>.+)\.safetensors(\.(?P<before>\w+))?\.index(\.(?P<after>\w+))?\.json$")


def is_index(name: str) -> bool:
    """Whether a file's name is that of an index."""
    return INDEX_NAME.match(name) is not None


def read_index(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """Read an index.

    Returns:
        The shards in natural order, each below the index's directory, and the shard of every tensor.

    Raises:
        FileNotFoundError: the index or a shard is missing.
        CheckpointError: the index is malformed, or names a file outside its directory.
    """
    from weightload.checkpoint import natural_key

    weight_map = _weight_map(path)
    shards = {name: _shard_path(path, name) for name in sorted(set(weight_map.values()), key=natural_key)}
    missing = [shard for shard in shards.values() if not shard.exists()]
    if missing:
        raise FileNotFoundError(
            2, f"Shard missing ({len(missing)} of {len(shards)} that {path.name} names)", str(missing[0])
        )
    return list(shards.values()), {tensor: shards[name] for tensor, name in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        # The hook sees every object of the file, and duplicates before a dict swallows them.
        content = json.loads(path.read_bytes(), object_pairs_hook=lambda pairs: _no_duplicates(pairs, path))
    except (ValueError, RecursionError) as problem:
        raise _refuse(path, f"is not JSON: {problem}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refuse(path, "has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise _refuse(path, f"weight_map gives no file name for tensor `{tensor}`")
    return weight_map


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _refuse(path, f"`{twice}` occurs twice")
    return content


def _shard_path(index: Path, name: str) -> Path:
    """The path of a shard, which must lie below the index's directory.

    The file itself may be a link that leads elsewhere, as in a hub's cache; the folders on the way may not.
    """
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise _refuse(index, f"names a file outside its directory: {name!r}")
    if not name.endswith(".safetensors"):
        raise _refuse(index, f"names a file that is not a safetensors file: {name!r}")
    path = index.parent.joinpath(*pure.parts)
    root = os.path.realpath(index.parent)
    if os.path.commonpath([root, os.path.realpath(path.parent)]) != root:
        raise _refuse(index, f"names a file outside its directory: {name!r}")
    return path


def _refuse(path: Path, what: str) -> CheckpointError:
    error = CheckpointError(f"{path}: {what}")
    error.filename = str(path)
    return error
