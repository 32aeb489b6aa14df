"""diffusers: a shard at a time is loaded whole, one after the other or several at once (parallel loading)."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

from weightload._install.framework import Framework


def _pairs() -> Iterable[tuple[object, object]]:
    from diffusers.models import model_loading_utils

    from weightload._install.stand_ins import private_memory

    original = model_loading_utils.load_state_dict

    @functools.wraps(original)
    def load_state_dict(checkpoint_file: Any, disable_mmap: bool = False, map_location: Any = "cpu") -> Any:
        is_path = isinstance(checkpoint_file, (str, os.PathLike))
        if not disable_mmap or not is_path or not os.fspath(checkpoint_file).endswith(".safetensors"):
            return original(checkpoint_file, disable_mmap, map_location)
        # It would read all of the file in one thread, and then copy each tensor out of that.
        with private_memory():
            return original(checkpoint_file, disable_mmap=False, map_location="cpu")

    return [(original, load_state_dict)]


FRAMEWORK = Framework(
    package="diffusers",
    sites=(
        ("diffusers.models.model_loading_utils", "safetensors"),
        ("diffusers.models.model_loading_utils", "load_state_dict"),
        ("diffusers.models.modeling_utils", "load_state_dict"),
    ),
    pairs=_pairs,
)
