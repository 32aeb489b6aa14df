"""vLLM's ``--load-format weightload``: the engine's own loader, whose safetensors files are read by weightload.

vLLM calls ``register`` in each of its processes. Nothing else changes until the format is chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

import weightload
from weightload import settings
from weightload._group.ranks import require_strategy
from weightload._load.devices import accelerator, resolve
from weightload._load.options import require_backend
from weightload.integrations.in_name_order import in_name_order
from weightload.integrations.in_parts import InParts

LOAD_FORMAT = "weightload"
CALL_KEYS = ("device", "strategy", "backend", "parts")
"""Keys of ``model_loader_extra_config``, next to the settings."""

ITERATOR = "safetensors_weights_iterator"
METHOD = "_get_weights_iterator"
# Backends by what the engine's iterator does with its files. Reading ahead is what this one does in any case.
BACKENDS = {None: "mmap", "lazy": "mmap", "prefetch": "mmap", "eager": "pread"}
# Options of the engine's iterator that are useless here: threads and sizes of its own reading ahead.
PREFETCH_KEYS = ("safetensors_prefetch_num_threads", "safetensors_prefetch_block_size")

_log = logging.getLogger("vllm.weightload")  # below vLLM's own: shown as its messages are


@dataclasses.dataclass(frozen=True)
class Options:
    """The part of ``model_loader_extra_config`` that is for weightload."""

    device: str = "cpu"
    """``"cpu"``, from where the engine copies what a rank wants of each tensor; or the type of the accelerator."""
    strategy: str = "independent"
    """How the ranks of the engine's tensor-parallel group share the reading."""
    backend: str | None = None
    """``"mmap"`` or ``"pread"``; None: what the engine's load strategy says."""
    parts: bool = False
    """Whether large tensors are read as far as the engine narrows them, rather than whole."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values of ``weightload.settings``, by name."""

    def __post_init__(self) -> None:
        require_strategy(self.strategy)
        require_backend(self.backend or "mmap")
        if not isinstance(self.parts, bool):
            raise ValueError(f"parts {self.parts!r}: must be true or false")
        if self.parts and self.strategy != "independent":
            raise ValueError(f"parts: each rank reads its own, which cannot be shared (strategy {self.strategy!r})")
        kind = accelerator()
        if self.device != "cpu" and (kind is None or self.device != kind.type):
            raise ValueError(
                f"device {self.device!r}: must be 'cpu' or the accelerator's type"
                f" ({repr(kind.type) if kind else 'there is none here'}); the engine says which of its devices"
            )
        with settings.override(**self.settings):
            settings.current()

    @classmethod
    def pop(cls, extra: dict[str, Any]) -> Options:
        """Take weightload's keys out of the engine's extra config.

        Raises:
            ValueError: a value that is not allowed.
        """
        own = {key: extra.pop(key) for key in CALL_KEYS if key in extra}
        return cls(**own, settings={key: extra.pop(key) for key in settings.NAMES if key in extra})

    def group(self) -> Any:
        """The ranks that read together: those that hold parts of the same tensors, and load them at the same time."""
        if self.strategy == "independent" or not torch.distributed.is_initialized():
            return None
        from vllm.distributed import get_tp_group

        ranks = get_tp_group()
        return ranks.cpu_group if self.device == "cpu" else ranks.device_group


def weights_of(
    options: Options,
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]],
    hf_weights_files: list[str],
    use_tqdm_on_load: bool = True,
    safetensors_load_strategy: str | None = None,
    local_expert_ids: set[int] | None = None,
    **more: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """In place of vLLM's ``safetensors_weights_iterator``, whose arguments these are.

    Names of experts differ between the ranks of an expert-parallel group: those of others are not read. What this does
    not know, such as checkpoints of torchao, is left to the ``original``, and a warning says so.
    """
    unknown = sorted(set(more) - set(PREFETCH_KEYS))
    if safetensors_load_strategy not in BACKENDS or unknown:
        _log.warning(
            "weightload leaves this load to vLLM: it does not know %s",
            ", ".join(unknown) or f"the load strategy {safetensors_load_strategy!r}",
        )
        arguments = {"safetensors_load_strategy": safetensors_load_strategy, "local_expert_ids": local_expert_ids}
        yield from original(hf_weights_files, use_tqdm_on_load, **arguments, **more)
        return
    files = in_order(hf_weights_files)
    names = None if local_expert_ids is None else functools.partial(is_local, local_expert_ids)
    backend: Any = options.backend or BACKENDS[safetensors_load_strategy]
    if options.parts:
        yield from in_parts(options, files, backend, names)
        return
    group = options.group()
    with settings.override(**options.settings):
        weights = weightload.safetensors_weights_iterator(
            files,
            device=options.device,  # of an accelerator the current one, which the engine has set for this process
            group=group,
            strategy="independent" if group is None else options.strategy,
            names=names,
            duplicates="last",
            show_progress=None if use_tqdm_on_load else False,
            backend=backend,
        )
    _log.info("weightload reads %d files to the device %s", len(hf_weights_files), options.device)
    with contextlib.closing(weights):
        yield from in_name_order(weights, files, names)


def in_parts(
    options: Options, files: list[str], backend: Any, names: Callable[[str], bool] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, of which this rank reads what the engine's loaders of parameters narrow them to."""
    weights = InParts(files, resolve(options.device), backend, names, options.settings)
    _log.info("weightload reads %d files to the device %s, in parts", len(files), options.device)
    yield from weights
    counts = weights.counts
    read = counts.ahead + counts.asked
    _log.info("weightload has read %d of %d bytes, %d of them ahead", read, counts.checkpoint, counts.ahead)


def in_order(files: list[str]) -> list[str]:
    """The files as vLLM orders them: of a tensor in two of them, the last one counts."""
    from vllm.model_executor.model_loader import weight_utils

    return sorted(files, key=getattr(weight_utils, "_natural_sort_key", None))


def is_local(local_expert_ids: set[int], name: str) -> bool:
    """Whether the engine's expert filter leaves a tensor to this rank."""
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return not should_skip_weight(name, local_expert_ids)


def with_iterator(method: Callable[..., Any], iterator: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of an engine's method that finds another ``safetensors_weights_iterator`` among its globals.

    So the choice of files and all filters are those of the installed version, and no other loader sees a difference.
    """
    method = inspect.unwrap(method)
    scope = {**method.__globals__, ITERATOR: iterator}
    copy = types.FunctionType(method.__code__, scope, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


def make_loader(default: type) -> type:
    """The loader of the format: a subclass of vLLM's ``DefaultModelLoader``.

    Raises:
        RuntimeError: the class is not as this module knows it.
    """
    method = inspect.unwrap(getattr(default, METHOD, make_loader))
    original = method.__globals__.get(ITERATOR)
    if ITERATOR not in method.__code__.co_names or original is None:
        raise RuntimeError(f"its {default.__name__}.{METHOD} does not call {ITERATOR}")

    class WeightloadModelLoader(default):  # type: ignore[misc]
        """vLLM's default loader, for safetensors files, which weightload reads."""

        def __init__(self, load_config: Any) -> None:
            extra = load_config.model_loader_extra_config
            if isinstance(extra, dict):  # else the engine's own error
                extra = dict(extra)
                self.weightload_options = Options.pop(extra)
                if extra.get("enable_multithread_load"):
                    raise ValueError("enable_multithread_load: weightload has threads of its own; set threads instead")
            # The files of the format are those of "safetensors".
            super().__init__(
                dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config=extra)
            )

        def _get_weights_iterator(self, source: Any) -> Any:
            read = functools.partial(weights_of, self.weightload_options, original)
            return with_iterator(method, read)(self, source)

    return WeightloadModelLoader


@functools.cache
def register() -> None:
    """Make the load format known to vLLM, once in a process; vLLM's entry point ``vllm.general_plugins``.

    A vLLM that this does not fit is left as it is, and a warning says why.
    """
    try:
        from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

        register_model_loader(LOAD_FORMAT)(make_loader(DefaultModelLoader))
    except (ImportError, RuntimeError, AttributeError) as failed:
        _log.warning("weightload does not know this version of vLLM, and adds no load format: %s", failed)


__all__ = ["LOAD_FORMAT", "register"]
