"""Packages that only some addresses want."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, wants: str, install: str) -> Any:
    """A module that may not be installed.

    Raises:
        ModuleNotFoundError: it is not; ``wants`` says what it is for, and ``install`` what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        what = f"{wants} wants the package {module}; run: pip install {install}"
        raise ModuleNotFoundError(what, name=missing.name) from None
