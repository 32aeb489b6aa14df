"""Addresses of what servers have, which may stand for a file wherever a path may."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
WEB = ("http", "https")
HUB = "hf"
SCHEMES = (*BUCKETS, *WEB, HUB)

_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://", re.IGNORECASE)


def is_address(path: object) -> bool:
    """Whether a path is an address of something that a server has."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def scheme_of(address: str) -> str:
    """In small letters."""
    return address.partition("://")[0].lower()


def shown(address: str) -> str:
    """The address without what may be secret: a user's name and password, and the query, which may be a signature."""
    if scheme_of(address) not in WEB:
        return address
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def name_of(address: str) -> str:
    """What comes last of its path."""
    return shown(address).rstrip("/").rpartition("/")[2]


def below(address: str, name: str) -> str:
    """The address of a name below one. On the web its query goes along: a signature may be that of a folder."""
    if scheme_of(address) not in WEB:
        return f"{address.rstrip('/')}/{name}"
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def folder_of(address: str) -> str:
    """The address of what an address is in."""
    if scheme_of(address) not in WEB:
        return address.rpartition("/")[0]
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0]))
