"""FastVideo's ``safetensors_weights_iterator``, read by weightload among the ranks of its node group."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import weightload
from weightload._install.framework import Framework

ITERATOR = "safetensors_weights_iterator"
LOADER = "fastvideo.models.loader"
SITES = tuple((f"{LOADER}.{module}", ITERATOR) for module in ("weight_utils", "component_loader", "fsdp_load"))
"""Where the name is bound: module and attribute."""


def node_ranks() -> Any:
    """FastVideo's group of the ranks of this node; None where it has not made it."""
    from fastvideo.distributed import parallel_state

    if not torch.distributed.is_initialized():
        return None
    try:
        return parallel_state.get_node_group()
    except AssertionError:
        return None


def safetensors_weights_iterator(
    hf_weights_files: list[str],
    to_cpu: bool = False,
    broadcast: bool = True,
    async_broadcast: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """In place of FastVideo's function, whose arguments these are; the call starts the load.

    Args:
        hf_weights_files: paths of the files.
        to_cpu: load to the CPU, without communication. Else to FastVideo's device of this process.
        broadcast: share the reading among FastVideo's ranks of this node. Without them, or if False, every rank reads
            for itself.
        async_broadcast: accepted; a tensor is complete when it is yielded in any case.

    Raises:
        what ``weightload.safetensors_weights_iterator`` raises.
    """
    ranks = None if to_cpu or not broadcast else node_ranks()
    group = None if ranks is None or ranks.world_size == 1 else ranks.device_group
    return weightload.safetensors_weights_iterator(
        hf_weights_files,
        device="cpu" if to_cpu else local_device(),
        group=group,
        strategy="independent" if group is None else "auto",
        duplicates="last",
    )


def local_device() -> torch.device:
    """FastVideo's device of this process."""
    from fastvideo.distributed.parallel_state import get_local_torch_device

    return get_local_torch_device()  # type: ignore[no-any-return]


def require_known(original: Callable[..., Any]) -> None:
    """Raise ``RuntimeError`` for a function whose arguments or defaults are others: FastVideo's calls rely on them."""
    own, known = (
        {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
        for function in (original, safetensors_weights_iterator)
    )
    if own != known:
        raise RuntimeError(f"weightload does not know this version of FastVideo, whose {ITERATOR} takes {[*own]}")


def _pairs() -> Iterable[tuple[object, object]]:
    original = getattr(importlib.import_module(SITES[0][0]), ITERATOR)
    require_known(original)
    return [(original, safetensors_weights_iterator)]


FRAMEWORK = Framework(package="fastvideo", sites=SITES, pairs=_pairs)
