"""Options of the functions that safetensors has, too: checked, with errors that callers of either know."""

from __future__ import annotations

from typing import Literal

import torch

from weightload._base.handlers import pass_on
from weightload._load import devices
from weightload.errors import OptionError

Backend = Literal["mmap", "pread"]


def require_backend(backend: str) -> None:
    """Raise ``ValueError`` for what is no ``Backend``."""
    if backend not in ("mmap", "pread"):
        raise ValueError(f"backend {backend!r}: must be 'mmap' or 'pread'")


def device_of(device: devices.Device, backend: str = "mmap") -> torch.device:
    """The device that is meant.

    Raises:
        OptionError: torch cannot use it here, or there is no such backend.
    """
    try:
        require_backend(backend)
        return devices.resolve(device)
    except ValueError as error:
        pass_on(error)
        raise OptionError(str(error)) from None
