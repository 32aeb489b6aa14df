"""Addresses of what servers have, which may stand for a file wherever a path may."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from weightload._base.handlers import pass_on

AZURE = ("az", "azure", "abfs", "abfss", "adl")
BUCKETS = ("s3", "s3a", "gs", *AZURE)
CONTAINERS_OF_ACCOUNTS = ("abfs", "abfss")  # container@account.dfs.core.windows.net
WEB = ("http", "https")
HUB = "hf"
SCHEMES = (*BUCKETS, *WEB, HUB)

_LIKE_ONE = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):(//?)")
_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://", re.IGNORECASE)


def is_address(path: object) -> bool:
    """Whether a path is an address of something that a server has."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def is_hub(path: object) -> bool:
    """Whether it is an address of the hub's."""
    return isinstance(path, str) and is_address(path) and scheme_of(path) == HUB


def require_known(text: str) -> None:
    """Refuse what looks like an address and is none that can be read.

    Raises:
        ValueError: another scheme; or pathlib has taken a slash of it.
    """
    found = _LIKE_ONE.match(text)
    if found is None or _ADDRESS.match(text):
        return
    scheme = found[1]
    if found[2] == "//":
        raise ValueError(f"{scheme}://...: addresses are read that begin with {', '.join(SCHEMES)}")
    if scheme.lower() in SCHEMES:
        raise ValueError(f"{scheme}:/...: a slash is missing, as pathlib leaves it; pass an address as str")


def scheme_of(address: str) -> str:
    """In small letters."""
    return address.partition("://")[0].lower()


def shown(address: str) -> str:
    """The address without what may be secret: a user's name and password, and the query, which may be a signature.

    Of an object's key with a question mark only what is before it. A path is shown as it is.
    """
    if not is_address(address):
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    if scheme.lower() in WEB:
        path = path.partition("#")[0]
        if ":" in host.rpartition("@")[2].rpartition("]")[2] and not re.search(r":[0-9]*$", host):
            return f"{scheme}://..."  # no port: a password with a slash, say
    if scheme.lower() not in CONTAINERS_OF_ACCOUNTS:  # (hf:// has its @ behind the first slash)
        host = host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}"


def split(address: str) -> SplitResult:
    """The parts of an address on the web.

    Raises:
        ValueError: it is none; without what may be secret in it.
    """
    try:
        return urlsplit(address)
    except ValueError as failed:
        pass_on(failed)
    raise ValueError(f"{shown(address)}: this is no address")


def name_of(address: str) -> str:
    """The last part of its path."""
    name = shown(address).rstrip("/").rpartition("/")[2]
    return unquote(name) if scheme_of(address) in WEB else name


def below(address: str, name: str) -> str:
    """The address of a name below one. On the web its query goes along: a signature may be that of a folder."""
    if scheme_of(address) not in WEB:
        return f"{address.rstrip('/')}/{name}"
    parts = split(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def folder_of(address: str) -> str:
    """The address of what an address is in."""
    if scheme_of(address) not in WEB:
        return address.rpartition("/")[0]
    parts = split(address)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0]))
