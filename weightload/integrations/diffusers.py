"""diffusers: a shard at a time is loaded whole, one after the other or several at once (parallel loading).

With a device map of one accelerator a shard is loaded straight to it, where diffusers would copy each tensor out of
pageable memory. Not if much of it has to be cast, or is not the model's, which takes memory of the accelerator:
diffusers does that on the CPU.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch

from weightload._api.safe_open import safe_open
from weightload._base.dtypes import TORCH_DTYPES
from weightload._base.handlers import pass_on
from weightload._checkpoint.selection import open_files
from weightload._install.framework import Framework
from weightload._load.start import Reading, Source, start
from weightload.errors import WeightLoadError

LITTLE = 16  # one in this many of a shard's bytes may be cast on the accelerator, or dropped there
_straight_to: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("weightload_diffusers", default=None)


def _pairs() -> Iterable[tuple[object, object]]:
    from diffusers.models import model_loading_utils

    from weightload._install.stand_ins import private_memory

    original = model_loading_utils.load_state_dict

    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_state_dict(*arguments: Any, **options: Any) -> Any:
        given = _given(signature, arguments, options)
        # From inside of an archive (dduf) it takes bytes that it has.
        if not _is_file(given.get("checkpoint_file")) or given.get("dduf_entries"):
            return original(*arguments, **options)
        # It would read all of the file in one thread, and then copy each tensor out of that, on the CPU.
        private = given.get("disable_mmap")
        without = {"disable_mmap": False} if private else {}
        if (device := _straight_to.get()) is not None:
            try:
                return load_apart(given["checkpoint_file"], device)
            except (
                OSError,
                WeightLoadError,
            ) as error:  # for diffusers to say; where memory runs out its way takes less
                pass_on(error)
        if not private:
            return original(*arguments, **options)
        with private_memory():
            return original(**given | without | ({"map_location": "cpu"} if "map_location" in given else {}))

    load_shard = model_loading_utils._load_shard_file
    takes = inspect.signature(load_shard)

    @functools.wraps(load_shard)
    def load_shard_file(*arguments: Any, **options: Any) -> Any:
        device = _where_all_goes(_given(takes, arguments, options))
        token = _straight_to.set(device)
        try:
            return load_shard(*arguments, **options)
        finally:
            _straight_to.reset(token)

    return [(original, load_state_dict), (load_shard, load_shard_file)]


def load_apart(filename: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Every tensor of a file on an accelerator, in memory of its own, so that each may be dropped alone."""
    source = Source([filename], functools.partial(open_files, [filename]))
    return dict(start(source, device, reading=Reading(own_blocks=True)))


def _given(function: inspect.Signature, arguments: Any, options: Any) -> dict[str, Any]:
    try:
        return function.bind(*arguments, **options).arguments
    except TypeError as error:  # for the function to say
        pass_on(error)
        return {}


def _is_file(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and str(os.fspath(path)).endswith(".safetensors")


def _where_all_goes(given: dict[str, Any]) -> torch.device | None:
    """The one accelerator that all tensors of a shard go to as they are, if there is one."""
    from weightload._install.stand_ins import usable

    path, places = given.get("shard_file"), given.get("device_map")
    if not _is_file(path) or not isinstance(places, dict) or len(set(map(str, places.values()))) != 1:
        return None
    if given.get("hf_quantizer") is not None or given.get("dtype") is None:
        return None
    device = next(iter(places.values()))
    target = usable(device) if isinstance(device, (str, int, torch.device)) else None
    if target is None or target.type == "cpu" or not given.get("low_cpu_mem_usage"):
        return None
    few = _is_taken_as_it_is(path, given["dtype"], given.get("keep_in_fp32_modules") or (), given["model_state_dict"])
    return target if few else None


def _is_taken_as_it_is(path: Any, dtype: object, in_fp32: Iterable[str], model: Iterable[str]) -> bool:
    """Whether almost all of a file's bytes are the model's, and of the dtypes that it is to have."""
    try:
        with safe_open(path) as file:
            tensors = file._opened().file.tensors()
    except (OSError, WeightLoadError) as error:  # for the load to say
        pass_on(error)
        return False
    other = total = 0
    model = set(model)
    for name, dtype_name, _, begin, end in tensors:
        is_now = TORCH_DTYPES.get(dtype_name)
        becomes = torch.float32 if set(in_fp32) & set(name.split(".")) else dtype
        total += end - begin
        is_cast = is_now is not None and is_now.is_floating_point and is_now != becomes
        if is_cast or name not in model:
            other += end - begin
    return other * LITTLE <= total


FRAMEWORK = Framework(
    package="diffusers",
    sites=(
        ("diffusers.models.model_loading_utils", "safetensors"),
        ("diffusers.models.model_loading_utils", "load_state_dict"),
        ("diffusers.models.modeling_utils", "load_state_dict"),
        ("diffusers.models.model_loading_utils", "_load_shard_file"),
        ("diffusers.models.modeling_utils", "_load_shard_file"),
    ),
    pairs=_pairs,
)
