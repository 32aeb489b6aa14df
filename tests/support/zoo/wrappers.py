"""Modules of the zoo in torch's wrappers, which load_state_dict sees in names and state_dict does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from support.zoo.parts import ExtraState, Override, animal, chain


@animal
def wrapped_for_checkpointing() -> nn.Module:
    return chain(checkpoint_wrapper(nn.BatchNorm1d(4)))


@animal
def wrapped_root() -> nn.Module:
    return checkpoint_wrapper(chain(nn.Linear(4, 4)))


@animal
def wrapped_twice_and_within() -> nn.Module:
    inner = chain(offload_wrapper(checkpoint_wrapper(nn.Linear(4, 4))))
    return chain(checkpoint_wrapper(inner))


@animal
def wrapped_override() -> nn.Module:
    return chain(checkpoint_wrapper(Override()))


@animal
def wrapped_extra_state() -> nn.Module:
    return chain(checkpoint_wrapper(ExtraState()))


@animal
def wrapped_with_a_hook() -> nn.Module:
    """It gets names as load_state_dict tells them."""
    layer = nn.Linear(4, 4)

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = torch.full((4, 4), float(len(prefix)))

    layer.register_load_state_dict_pre_hook(hook)
    return chain(offload_wrapper(checkpoint_wrapper(layer)))


@animal
def wrapped_with_a_hook_after() -> nn.Module:
    """Which forgives a name as load_state_dict tells it."""
    model = chain(checkpoint_wrapper(nn.Linear(4, 4)))

    def hook(module: nn.Module, keys: Any) -> None:
        name = "1.0._checkpoint_wrapped_module.weight"
        if name in keys.missing_keys:
            keys.missing_keys.remove(name)

    model.register_load_state_dict_post_hook(hook)
    return model


@animal
def wrapper_with_a_hook() -> nn.Module:
    wrapper = checkpoint_wrapper(nn.Linear(4, 4))
    wrapper.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.clear())
    return chain(wrapper)


def doubled(module: Any) -> None:
    module.weight.data.mul_(2)


@animal
def wrapper_with_hooks_after() -> nn.Module:
    wrapper = checkpoint_wrapper(nn.Linear(4, 4))
    wrapper.register_load_state_dict_post_hook(lambda module, keys: doubled(module))
    wrapper._register_state_dict_hook(lambda module, state, prefix, _: state.update({prefix + "weight": None}))
    return chain(wrapper)


@animal
def wrapper_with_a_tensor_of_its_own() -> nn.Module:
    wrapper = checkpoint_wrapper(nn.Linear(4, 4))
    wrapper.scale = nn.Parameter(torch.ones(4))
    return chain(wrapper)


@animal
def wrapped_below_a_hook() -> nn.Module:
    model = chain(checkpoint_wrapper(nn.Linear(4, 4)))
    model.register_load_state_dict_pre_hook(lambda *_: None)
    return model


@animal
def tied_over_a_wrapper() -> nn.Module:
    model = chain(checkpoint_wrapper(nn.Linear(4, 4)))
    model[2].weight = model[1][0].weight
    return model


@animal
def wrapped_and_compiled() -> nn.Module:
    model: Any = torch.compile(chain(checkpoint_wrapper(nn.Linear(4, 4))))
    return nn.Sequential(model, checkpoint_wrapper(torch.compile(nn.Linear(4, 4))))  # type: ignore[arg-type]


@animal
def weight_norm_that_is_wrapped() -> nn.Module:
    return chain(checkpoint_wrapper(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))))
