"""transformers: slices of all files are asked for first, and become tensors in a pool of threads."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from weightload._install.framework import Framework


def _pairs() -> Iterable[tuple[object, object]]:
    from transformers import core_model_loading

    from weightload._install.read_ahead import Slice
    from weightload._install.stand_ins import usable

    original = core_model_loading._materialize_copy

    @functools.wraps(original)
    def materialize(tensor: Any, *arguments: Any, **options: Any) -> Any:
        named = dict(zip(("device", "dtype"), arguments, strict=False)) | options
        known = len(arguments) <= 2 and named.keys() <= {"device", "dtype"}
        device, dtype = named.get("device"), named.get("dtype")
        target = usable(device) if known and isinstance(tensor, Slice) and device is not None else None
        if target is None or target.type == "cpu":
            return original(tensor, *arguments, **options)
        there: torch.Tensor = tensor.to(target)
        return there if dtype is None else there.to(dtype)

    spawn = core_model_loading.spawn_materialize

    @functools.wraps(spawn)
    def spawn_materialize(thread_pool: Any, tensor: Any, *arguments: Any, **options: Any) -> Any:
        # Asked for as a slice was every tensor of the file; of those that come here, all are indexed.
        if isinstance(tensor, Slice) and not arguments[2:] and options.get("sharding_op") is None:
            device = arguments[0] if arguments else options.get("device")
            if (target := usable("cpu" if device is None else device)) is not None:
                tensor.will_be_wanted(target)
        return spawn(thread_pool, tensor, *arguments, **options)

    return [(original, materialize), (spawn, spawn_materialize)]


FRAMEWORK = Framework(
    package="transformers",
    sites=(
        ("transformers.modeling_utils", "safe_open"),
        ("transformers.core_model_loading", "_materialize_copy"),
        ("transformers.core_model_loading", "spawn_materialize"),
    ),
    pairs=_pairs,
)
