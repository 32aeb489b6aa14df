"""Moves model weights from safetensors files to where they are used, as fast as the hardware allows."""

from weightload import _built_for

_built_for.check()

from weightload._version import __version__  # noqa: E402
from weightload.api import load, load_file  # noqa: E402
from weightload.checkpoint import resolve_safetensors_files  # noqa: E402
from weightload.errors import HeaderError, ReadError, WeightLoadError  # noqa: E402
from weightload.into import load_into  # noqa: E402
from weightload.iterator import safetensors_weights_iterator  # noqa: E402
from weightload.load_report import LoadReport  # noqa: E402

__all__ = [
    "HeaderError",
    "LoadReport",
    "ReadError",
    "WeightLoadError",
    "__version__",
    "load",
    "load_file",
    "load_into",
    "resolve_safetensors_files",
    "safetensors_weights_iterator",
]
