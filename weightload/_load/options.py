"""Options of the functions that safetensors has, too: checked, with errors that callers of either know."""

from __future__ import annotations

import torch

from weightload._base.handlers import pass_on
from weightload._load import devices
from weightload._load.iterator import require_backend
from weightload.errors import OptionError


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
