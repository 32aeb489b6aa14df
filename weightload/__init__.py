"""Moves model weights from safetensors files to where they are used, as fast as the hardware allows."""

from weightload import _built_for

_built_for.check()

from weightload._api.files import load, load_file  # noqa: E402
from weightload._api.safe_open import safe_open  # noqa: E402
from weightload._base.kept_memory import release_memory  # noqa: E402
from weightload._base.load_stats import LoadStats  # noqa: E402
from weightload._checkpoint.passed_over import PassedOverWarning  # noqa: E402
from weightload._checkpoint.resolve import resolve_safetensors_files  # noqa: E402
from weightload._group.ranks import node_group  # noqa: E402
from weightload._install.installing import install, installed, uninstall  # noqa: E402
from weightload._into.into import load_into  # noqa: E402
from weightload._into.load_model import load_model  # noqa: E402
from weightload._into.load_report import LoadReport  # noqa: E402
from weightload._load.iterator import safetensors_weights_iterator  # noqa: E402
from weightload._version import __version__  # noqa: E402
from weightload.errors import (  # noqa: E402
    GroupError,
    HeaderError,
    RankDisagreementError,
    RankLeftError,
    ReadError,
    WeightLoadError,
)

# A pickle of one names a place that stays.
LoadReport.__module__ = LoadStats.__module__ = PassedOverWarning.__module__ = "weightload"

__all__ = [
    "GroupError",
    "HeaderError",
    "LoadReport",
    "LoadStats",
    "PassedOverWarning",
    "RankDisagreementError",
    "RankLeftError",
    "ReadError",
    "WeightLoadError",
    "__version__",
    "install",
    "installed",
    "load",
    "load_file",
    "load_into",
    "load_model",
    "node_group",
    "release_memory",
    "resolve_safetensors_files",
    "safe_open",
    "safetensors_weights_iterator",
    "uninstall",
]
