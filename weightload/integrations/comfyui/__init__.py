"""A custom node folder of ComfyUI: its safetensors files are read by weightload. Untested with ComfyUI itself.

Link or copy this folder to ``custom_nodes/weightload``; it has no nodes. ``comfy.utils.load_torch_file`` stays
ComfyUI's; only the ``safe_open`` that it finds is another one. Where ComfyUI maps files by itself (its dynamic memory)
it calls no ``safe_open``, and nothing changes. ``WEIGHTLOAD_COMFYUI=0`` switches this off.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import safetensors
import torch

import weightload
from weightload._api.safe_open import TORCH_NAMES
from weightload._install.stand_ins import served

NODE_CLASS_MAPPINGS: dict[str, type] = {}
VARIABLE = "WEIGHTLOAD_COMFYUI"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def telling_messages() -> Iterator[None]:
    """Errors say in their first argument what ComfyUI looks for in it: text, and the name of the broken rule."""
    try:
        yield
    except (weightload.WeightLoadError, OSError) as error:
        error.args = (f"{type(error).__name__}: {error}",)
        raise


class WholeFile:
    """A handle for callers that take every tensor of a file once, like ``load_torch_file``: they are read together."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self._path, self._open = path, options
        with telling_messages():
            self._handle = weightload.safe_open(path, framework="pt", **self._open)
        self._tensors: dict[str, torch.Tensor] | None = None

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tensors = None
        self._handle.__exit__(*exception)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, on the device of the handle."""
        if self._tensors is None:
            with telling_messages():
                self._tensors = weightload.load_file(self._path, **self._open)
        return self._tensors.pop(name) if name in self._tensors else self._handle.get_tensor(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


class Safetensors:
    """The module safetensors, but for ``safe_open``."""

    def __init__(self, comfy_utils: Any) -> None:
        self._utils = comfy_utils

    def safe_open(self, filename: str, framework: str = "pt", device: Any = "cpu", **options: Any) -> Any:
        """Open a file to be read as a whole; safetensors itself opens it where weightload does not serve."""
        how = served(filename, device, options) if framework in TORCH_NAMES else None
        if how is None:
            return safetensors.safe_open(filename, framework=framework, device=device, **options)
        if getattr(self._utils, "DISABLE_MMAP", False):
            how["backend"] = "pread"
        return WholeFile(filename, how)

    def __getattr__(self, name: str) -> Any:
        return getattr(safetensors, name)


def install() -> None:
    """Put weightload into ``comfy.utils``, once. A ComfyUI that this does not fit is left as it is, with a warning."""
    try:
        import comfy.utils as utils
    except ImportError as failed:
        _log.warning("weightload finds no comfy.utils, and leaves ComfyUI's loading alone: %s", failed)
        return
    if getattr(utils, "safetensors", None) is safetensors and hasattr(utils, "load_torch_file"):
        utils.safetensors = Safetensors(utils)
    elif not isinstance(getattr(utils, "safetensors", None), Safetensors):
        _log.warning("weightload does not know this version of ComfyUI: comfy.utils opens no file by safetensors")


if os.environ.get(VARIABLE, "1") != "0":
    install()
