"""SGLang's safetensors iterators, read by weightload where ``WEIGHTLOAD_SGLANG=1``.

SGLang calls ``register`` in each of its processes, and applies the hooks when all plugins have been called.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import weightload
from weightload.integrations.in_name_order import in_name_order

VARIABLE = "WEIGHTLOAD_SGLANG"
MODULE = "sglang.srt.model_loader.weight_utils"
ITERATORS = ("safetensors_weights_iterator", "buffered_multi_thread_safetensors_weights_iterator")
FILES = "hf_weights_files"
# Arguments of the iterators that change nothing here: all of them read ahead, with the threads of the settings.
WITHOUT_EFFECT = {"max_workers", "prefetch", "prefetch_num_threads"}
SERVED = {FILES, "disable_mmap", "drop_cache_after_load", *WITHOUT_EFFECT}

_log = logging.getLogger(__name__)
_registered: set[str] = set()

Weights = Iterator[tuple[str, torch.Tensor]]


def read_instead(original: Callable[..., Weights], *args: Any, **kwargs: Any) -> Weights:
    """A hook around either iterator: the same tensors, read by weightload to the CPU.

    A call with an argument that this does not know, and that is not at its default, is left to the ``original``.
    """
    call = inspect.signature(original).bind(*args, **kwargs)
    parameters = call.signature.parameters
    unknown = [
        name
        for name, value in call.arguments.items()
        if name not in SERVED and value is not parameters[name].default and value != parameters[name].default
    ]
    if unknown:
        _log.warning("weightload leaves this load to SGLang: it does not know %s", ", ".join(unknown))
        return original(*args, **kwargs)
    given = call.arguments
    return weights_of(
        given[FILES],
        disable_mmap=given.get("disable_mmap", False),
        drop_cache_after_load=given.get("drop_cache_after_load", False),
    )


def weights_of(files: Sequence[str], disable_mmap: bool, drop_cache_after_load: bool) -> Weights:
    """The tensors of the files, in the order of these; of a name in several files all, or the last."""
    # Pages that a mapping holds cannot be dropped, and a tensor holds the mapping of its file.
    backend = "pread" if disable_mmap or drop_cache_after_load else "mmap"
    # Dropped as soon as a file is done: files are loaded one by one then, which costs the reading ahead between them.
    for batch in [[file] for file in files] if drop_cache_after_load else [list(files)]:
        weights = weightload.safetensors_weights_iterator(
            batch,
            to_cpu=True,
            duplicates="last",
            backend=backend,  # type: ignore[arg-type]
        )
        with contextlib.closing(weights):
            yield from in_name_order(weights, batch)
        if drop_cache_after_load:
            drop_cache(batch[0])


def drop_cache(file: str) -> None:
    """Put a file out of the page cache, where the system lets us."""
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def require_known(module: Any) -> None:
    """Raise ``RuntimeError`` for a module whose iterators are not as this one knows them."""
    for name in ITERATORS:
        iterator = getattr(module, name, None)
        if not callable(iterator) or next(iter(inspect.signature(iterator).parameters), "") != FILES:
            raise RuntimeError(f"{MODULE} has no {name}({FILES}, ...)")


def register() -> None:
    """Hook the iterators, once in a process; SGLang's entry point ``sglang.srt.plugins``.

    Does nothing unless ``WEIGHTLOAD_SGLANG`` is 1. An SGLang that this does not fit is left as it is, and a warning
    says why.
    """
    if os.environ.get(VARIABLE) != "1" or _registered:
        return
    try:
        from sglang.srt.model_loader import weight_utils
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        require_known(weight_utils)
    except (ImportError, RuntimeError) as failed:
        _log.warning("weightload does not know this version of SGLang, and leaves its loading alone: %s", failed)
        return
    for name in ITERATORS:
        # The registry also rebinds the name in every module that has imported it.
        HookRegistry.register(f"{MODULE}.{name}", read_instead, HookType.AROUND)
        _registered.add(name)


__all__ = ["register"]
