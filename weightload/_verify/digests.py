"""Which digest a file of a checkpoint should have: the caller says so, or what lies beside the file."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from weightload._base.addresses import WEB, below, folder_of, is_address, is_hub, name_of, scheme_of, shown
from weightload._base.handlers import pass_on
from weightload._base.printable import printable
from weightload._checkpoint.index import bytes_of_regular_file
from weightload.errors import CheckpointError, located

Verify = str | Mapping[str, str]
"""``"sha256"``: the SHA-256 are found; or a digest for each file's name: 64 hexadecimal digits are a SHA-256, and
``"crc32c:..."``, ``"crc64nvme:..."`` what a store keeps of a whole object, in hexadecimal digits or in base64.

A name may have folders: it is then that of the file whose path ends so.
"""


class Kind(NamedTuple):
    """A kind of digest: its name as it is shown, and its size."""

    shown: str
    bytes: int


SHA256 = "sha256"
KINDS = {SHA256: Kind("SHA-256", 32), "crc32c": Kind("CRC32C", 4), "crc64nvme": Kind("CRC64NVME", 8)}

SUMS = "SHA256SUMS"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_LINE = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(.+)")


def require_verify(verify: object) -> None:
    """Raise for what is no ``Verify``, nor None.

    Raises:
        ValueError: another word than "sha256", a digest that is none, or a name that is not one below a folder.
        TypeError: neither a word nor a mapping, or a name that is no text.
    """
    if isinstance(verify, str):
        if verify != "sha256":
            raise ValueError(f"verify={verify!r}: must be 'sha256', or a mapping from file names to digests")
    elif isinstance(verify, Mapping):
        for name, digest in verify.items():
            if not isinstance(name, str):
                raise TypeError(f"verify: the names of files must be str, not {type(name).__name__}")
            if not name or name.startswith("/") or not _parts(name) or ".." in _parts(name):
                raise ValueError(f"verify: {name!r} must be a file's name, or its path below the checkpoint's folder")
            if _normal(digest) is None:
                what = "a SHA-256, as 64 hexadecimal digits, or a CRC of a whole object, as 'crc32c:' or 'crc64nvme:'"
                raise ValueError(
                    f"verify: {name!r} must have {what} and its hexadecimal digits or base64, not {digest!r}"
                )
    elif verify is not None:
        raise TypeError(f"verify must be 'sha256' or a mapping, not {type(verify).__name__}")


def _normal(digest: object) -> str | None:
    """The kind of a digest, and its hexadecimal digits in small letters; None if it is none."""
    if not isinstance(digest, str):
        return None
    kind, colon, value = digest.rpartition(":")
    kind = kind if colon else SHA256
    if kind not in KINDS:
        return None
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * KINDS[kind].bytes}}}", value):
        try:
            value = base64.b64decode(value, validate=True).hex()
        except (binascii.Error, ValueError) as wrong:
            pass_on(wrong)
            return None
        if not colon or len(value) != 2 * KINDS[kind].bytes:
            return None
    return f"{kind}:{value.lower()}"


def expected_digests(paths: Sequence[str], verify: Verify) -> list[str]:
    """The digest of each file: its kind, a colon, and hexadecimal digits in small letters.

    Found are, in this order: the name of the blob that a file of the hub's cache is a link to; what the hub says of a
    file at an ``hf://`` address; a line of a file ``SHA256SUMS`` in the file's folder.

    Raises:
        CheckpointError: of a file none is known, or ``verify`` has a name that is two files'.
        OSError: what says it cannot be read.
    """
    if isinstance(verify, Mapping):
        return _given(paths, verify)
    sums: dict[str, dict[str, str]] = {}
    found = []
    for path in paths:
        digest = _found(path, name_of(path) if is_address(path) else os.path.basename(path), sums)
        if digest is None:
            where = shown(path)
            what = f"no SHA-256 of it is known, by the hub or by a {SUMS} beside it"
            raise located(CheckpointError(f"{where}: {what}"), where)
        found.append(f"{SHA256}:{digest.lower()}")
    return found


def _given(paths: Sequence[str], verify: Mapping[str, str]) -> list[str]:
    """The digests of a mapping: of each file that of the longest name that its path ends with."""
    digests: dict[tuple[str, ...], str] = {}
    for name, given in verify.items():
        digest = _normal(given)
        assert digest is not None  # by require_verify
        if digests.setdefault(_parts(name), digest) != digest:
            raise CheckpointError(f"verify= has two digests for {printable(name)}")
    most = max(map(len, digests), default=0)
    taken: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}
    found = []
    for path in paths:
        where, parts = shown(path), _parts(_path_of(path))
        fitting = (parts[-count:] for count in range(min(most, len(parts)), 0, -1))
        known = next((end for end in fitting if end in digests), None)
        if known is None:
            what = f"verify= has no digest of it, by the name {printable(parts[-1] if parts else '')}"
            raise located(CheckpointError(f"{where}: {what}"), where)
        other, its_parts = taken.setdefault(known, (path, parts))
        if its_parts != parts:
            what = f"{where}: verify= names it {printable('/'.join(known))}, and so it does {shown(other)}"
            raise located(CheckpointError(f"{what}: say more of their paths"), where)
        found.append(digests[known])
    return found


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _path_of(path: str) -> str:
    """The path of a file, or of an address."""
    if not is_address(path):
        return os.path.abspath(path)
    below = shown(path).partition("://")[2]
    return unquote(below) if scheme_of(path) in WEB else below


def _found(path: str, name: str, sums: dict[str, dict[str, str]]) -> str | None:
    if is_hub(path):
        from weightload._remote import hub

        path = hub.local(path)  # which is what is loaded
    if is_address(path):
        of_hub = hub.digest_of(path) if is_hub(path) else None
        if of_hub:
            return of_hub
    else:
        blob = os.path.basename(os.path.realpath(path))
        if os.path.islink(path) and _DIGEST.fullmatch(blob):
            return blob
    folder = folder_of(path) if is_address(path) else os.path.dirname(path)
    if folder not in sums:
        sums[folder] = _read_sums(folder)
    return sums[folder].get(name)


def _read_sums(folder: str) -> dict[str, str]:
    try:
        if is_address(folder):
            from weightload._remote import names

            text = names.content(below(folder, SUMS)).decode("utf-8", "replace")
        else:
            text = os.fsdecode(bytes_of_regular_file(Path(folder, SUMS)))
    except FileNotFoundError as missing:
        pass_on(missing)
        return {}
    found: dict[str, str] = {}
    for line in (_LINE.fullmatch(line.strip()) for line in text.splitlines()):
        if line and found.setdefault(line[2].removeprefix("./"), line[1]).lower() != line[1].lower():
            where = shown(folder)
            raise located(CheckpointError(f"{where}/{SUMS}: two digests for {printable(line[2])}"), where)
    return found
