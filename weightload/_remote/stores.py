"""The library's stores: one for a bucket, or for an address on the web."""

from __future__ import annotations

import base64
import datetime
import os
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urlunsplit

from weightload._base.addresses import AZURE, HUB, WEB, scheme_of, shown, split
from weightload._base.handlers import pass_on
from weightload._remote.hub import url_of
from weightload._remote.optional import optional
from weightload.errors import AddressError

# Environment variables that the library makes a store by: credentials, endpoints.
PREFIXES = ("AWS_", "AZURE_", "GOOGLE_")
ACCOUNTS = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")

# The whole of a request may take long, as its bytes do on slow networks; nothing of it may come for so long.
CLIENT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "1day"}
RETRIES = {
    "max_retries": 6,
    "retry_timeout": datetime.timedelta(seconds=60),
    "backoff": {"init_backoff": datetime.timedelta(milliseconds=100), "max_backoff": datetime.timedelta(seconds=5)},
}


class Place(NamedTuple):
    """Where something is: a store of the library's, and a path in it."""

    store: Any
    path: str


_stores: dict[object, Any] = {}


def library() -> Any:
    """The ``obstore`` module.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    optional("obstore.store", "loading from servers", "'weightload[remote]'")
    return optional("obstore", "loading from servers", "'weightload[remote]'")


def place_of(address: str) -> Place:
    """The store and the path that an address means.

    Raises:
        ModuleNotFoundError: as ``library``.
        AddressError: no store can be made of it.
    """
    stores = library().store
    scheme = scheme_of(address)
    try:
        if scheme in WEB:
            return Place(_web_store(stores, address), "")
        if scheme == HUB:
            return Place(_web_store(stores, *url_of(address)), "")
        bucket, _, path = address.partition("://")[2].partition("/")
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(PREFIXES)))
        key = scheme, bucket, environment
        if key not in _stores:
            if scheme in AZURE and os.environ.get(ACCOUNTS[0]) == "":
                raise ValueError("no account")  # the library would ask for one of no name
            plain = any(os.environ.get(name, "").lower().startswith("http://") for name in ENDPOINTS)
            options = {**CLIENT, "allow_http": True} if plain else CLIENT
            _stores[key] = stores.from_url(f"{scheme}://{bucket}", client_options=options, retry_config=RETRIES)
        return Place(_stores[key], path)
    except (ModuleNotFoundError, AddressError):
        raise
    except Exception as error:
        pass_on(error)  # not its words, which may have secrets in them
    raise AddressError(f"{shown(address)}: no store can be made of this address: {_what_is_missing(address)}")


def _what_is_missing(address: str) -> str:
    scheme, host = scheme_of(address), split(address).netloc
    if scheme in WEB:
        return "the server's name or its port"
    if not host:
        return "it names no bucket"
    if scheme in AZURE and not any(os.environ.get(name) for name in ACCOUNTS):
        return f"Azure wants an account ({ACCOUNTS[0]}), and credentials where the container is not public"
    return "the library does not take it, or what the environment says of it"


def _web_store(stores: Any, address: str, headers: Mapping[str, bytes] | None = None) -> Any:
    """Of one address alone: the library would write the rest of a path in its own way, and knows no queries there."""
    parts = split(address)
    if not parts.hostname:
        raise AddressError(f"{shown(address)}: it names no server")
    user, at, host = parts.netloc.rpartition("@")
    options: dict[str, Any] = {**CLIENT, "allow_http": parts.scheme.lower() == "http"}
    if at:
        headers = {"authorization": b"Basic " + base64.b64encode(unquote(user).encode())}
    if headers:
        options["default_headers"] = headers
    plain = urlunsplit((parts.scheme.lower(), host, parts.path, parts.query, ""))
    return stores.HTTPStore.from_url(plain, client_options=options, retry_config=RETRIES)
