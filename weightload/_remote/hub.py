"""Repositories of the Hugging Face hub: ``hf://org/repo[@revision][/path]``, in its local cache first."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from weightload._base.addresses import HUB, is_hub, shown
from weightload._base.handlers import pass_on
from weightload._remote.failures import read_error
from weightload._remote.optional import optional
from weightload.errors import AddressError


class Repo(NamedTuple):
    """A repository, or something in it."""

    name: str
    """``org/repo``"""
    revision: str | None
    path: str

    def address(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{HUB}://{self.name}{at}{'/' * bool(self.path)}{self.path}"


def parse(address: str) -> Repo:
    """The parts of an address.

    Raises:
        AddressError: it names no repository.
    """
    organisation, _, rest = address.partition("://")[2].partition("/")
    repository, _, path = rest.partition("/")
    name, _, revision = repository.partition("@")
    if not organisation or not name:
        raise AddressError(
            f"{shown(address)}: must be hf://organisation/repository, with @revision and a path or without"
        )
    return Repo(f"{organisation}/{name}", revision or None, path.strip("/"))


def hub() -> Any:
    """The ``huggingface_hub`` module.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return optional("huggingface_hub", "hf://", "huggingface_hub")


def _asked(address: str, ask: Callable[[], Any]) -> Any:
    """An answer of the hub's, whose own exceptions may have all of an address in them."""
    where = shown(address)
    try:
        return ask()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        pass_on(error)
        kind = type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "GatedRepoError" or status in (401, 403):
        raise PermissionError(errno.EACCES, "The hub wants other credentials, or has no such repository", where)
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError") or status == 404:
        raise FileNotFoundError(errno.ENOENT, "The hub has no such repository, revision or file", where)
    raise read_error(where, f"the hub cannot be asked ({kind})")


def cached(address: str) -> str | None:
    """The local path of a file, or of a folder, that the hub's cache has; None if it has not."""
    repo = parse(address)
    if "." in os.path.basename(repo.path):
        found = hub().try_to_load_from_cache(repo.name, repo.path, revision=repo.revision)
        return found if isinstance(found, str) and os.path.exists(found) else None
    try:
        folder = hub().snapshot_download(repo.name, revision=repo.revision, local_files_only=True)
    except Exception as failed:  # its classes differ from version to version
        pass_on(failed)
        return None
    return os.path.join(folder, repo.path) if os.path.isdir(os.path.join(folder, repo.path)) else None


def local(path: str) -> str:
    """The local path of what the hub's cache has of an address; all else as it is."""
    return (cached(path) if is_hub(path) else None) or path


def pinned(address: str) -> str:
    """The address with the commit that its revision means now.

    Raises:
        FileNotFoundError: the hub has no such repository, or revision. PermissionError: it wants other credentials.
        ReadError: it cannot be asked.
    """
    repo = parse(address)
    sha: str = _asked(address, lambda: hub().HfApi().model_info(repo.name, revision=repo.revision).sha)
    return repo._replace(revision=sha).address()


def names_in(address: str) -> list[str]:
    """The names of the files directly below an address. Raises as ``pinned``."""
    repo = parse(address)
    prefix = f"{repo.path}/" if repo.path else ""
    files = _asked(address, lambda: hub().HfApi().list_repo_files(repo.name, revision=repo.revision))
    names = [file[len(prefix) :] for file in files if file.startswith(prefix)]
    return [name for name in names if "/" not in name]


def digest_of(address: str) -> str | None:
    """The SHA-256 that the hub says a file has, without asking for the file; None of a small one.

    Raises as ``pinned``.
    """
    url, _ = url_of(address)
    tag: str | None = _asked(address, lambda: hub().get_hf_file_metadata(url).etag)
    return tag if tag and re.fullmatch(r"[0-9a-f]{64}", tag) else None


def url_of(address: str) -> tuple[str, dict[str, bytes]]:
    """Where the hub has a file, and what to send along."""
    repo = parse(address)
    url: str = hub().hf_hub_url(repo.name, repo.path, revision=repo.revision)
    token = hub().get_token()
    return url, {"authorization": b"Bearer " + token.encode()} if token else {}
