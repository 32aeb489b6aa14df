"""diffusers: a shard at a time is loaded whole, one after the other or several at once (parallel loading)."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable
from typing import Any

from weightload._base.handlers import pass_on
from weightload._install.framework import Framework


def _pairs() -> Iterable[tuple[object, object]]:
    from diffusers.models import model_loading_utils

    from weightload._install.stand_ins import private_memory

    original = model_loading_utils.load_state_dict

    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_state_dict(*arguments: Any, **options: Any) -> Any:
        try:
            given = signature.bind(*arguments, **options).arguments
        except TypeError as error:  # for it to say
            pass_on(error)
            given = {}
        path = given.get("checkpoint_file")
        is_file = isinstance(path, (str, os.PathLike)) and str(os.fspath(path)).endswith(".safetensors")
        # From inside of an archive (dduf) it takes bytes that it has.
        if not is_file or not given.get("disable_mmap") or given.get("dduf_entries"):
            return original(*arguments, **options)
        # It would read all of the file in one thread, and then copy each tensor out of that, on the CPU.
        given |= {"disable_mmap": False} | ({"map_location": "cpu"} if "map_location" in given else {})
        with private_memory():
            return original(**given)

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
