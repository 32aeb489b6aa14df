"""The library's stores: one for a bucket, or for an address on the web."""

from __future__ import annotations

import asyncio
import base64
import datetime
import os
from collections.abc import Mapping
from types import MappingProxyType
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
ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)

# The whole of a request may take long, as its bytes do on slow networks; nothing of it may come for so long.
CLIENT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "1day"}
SIGNED_FOR = datetime.timedelta(minutes=15)  # as long as a signature in a header; then the library signs each request
SECONDS_TO_SIGN = 5.0
RETRIES = {
    "max_retries": 6,
    "retry_timeout": datetime.timedelta(seconds=60),
    "backoff": {"init_backoff": datetime.timedelta(milliseconds=100), "max_backoff": datetime.timedelta(seconds=5)},
}


class Place(NamedTuple):
    """Where something is: a store of the library's, and a path in it.

    Attributes:
        address: of a request that another client may make for it; empty where it has to be signed for that.
        headers: that go along then.
        is_plain: whether a bucket's server is spoken to without TLS.
    """

    store: Any
    path: str
    address: str = ""
    headers: Mapping[str, str] = MappingProxyType({})
    is_plain: bool = False


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
            return _web_place(stores, address)
        if scheme == HUB:
            return _web_place(stores, *url_of(address))
        bucket, _, path = address.partition("://")[2].partition("/")
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(PREFIXES)))
        plain = any(os.environ.get(name, "").lower().startswith("http://") for name in ENDPOINTS)
        key = scheme, bucket, environment
        if key not in _stores:
            if scheme in AZURE and os.environ.get(ACCOUNTS[0]) == "":
                raise ValueError("no account")  # the library would ask for one of no name
            options = {**CLIENT, "allow_http": True} if plain else CLIENT
            _stores[key] = stores.from_url(f"{scheme}://{bucket}", client_options=options, retry_config=RETRIES)
        return Place(_stores[key], path, is_plain=plain)
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


def _web_place(stores: Any, address: str, headers: Mapping[str, bytes] | None = None) -> Place:
    """Make a place of one address: the library would write the rest of a path its way, and knows no queries there."""
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
    store = stores.HTTPStore.from_url(plain, client_options=options, retry_config=RETRIES)
    return Place(store, "", plain, {name: value.decode() for name, value in (headers or {}).items()})


async def open_address(place: Place) -> str:
    """The address of a request that another client may make: signed, if the store wants that. Empty if there is none.

    Signed by keys of the environment only, and not where the library does without: other ones it would ask a machine
    of the cloud for.
    """
    if not place.is_plain or not isinstance(place.store, library().store.S3Store):
        return place.address
    skips = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() not in ("", "0", "false", "no", "off", "n", "f")
    has_keys = os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY")
    if skips or not has_keys or os.environ.get("AWS_PROXY_URL"):
        return ""
    try:
        signing = library().sign_async(place.store, "GET", place.path, SIGNED_FOR)
        signed: str = await asyncio.wait_for(signing, SECONDS_TO_SIGN)
    except Exception as error:
        pass_on(error)
        return ""
    return signed


def patience() -> float:
    """Seconds in which something of an answer must come."""
    return float(CLIENT["read_timeout"].removesuffix("s"))
