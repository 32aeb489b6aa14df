"""Modules of the zoo with hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from support.zoo.parts import Override, animal, chain


@animal
def hook_before() -> nn.Module:
    layer = nn.Linear(4, 4)

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = torch.eye(4)

    layer.register_load_state_dict_pre_hook(hook)
    return chain(layer)


@animal
def hook_before_all() -> nn.Module:
    model = chain(nn.Linear(4, 4))

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in list(state):
            state[name] = state[name] * 3

    model.register_load_state_dict_pre_hook(hook)
    return model


@animal
def hook_before_with_complaints() -> nn.Module:
    layer = nn.Linear(4, 4)

    def hook(
        module: Any, state: Any, prefix: str, meta: Any, strict: bool, missing: Any, more: Any, errors: Any
    ) -> None:
        missing.append(f"{prefix}{strict}{meta}")
        more.append(prefix + "something")

    layer.register_load_state_dict_pre_hook(hook)
    return chain(layer)


@animal
def hook_after() -> nn.Module:
    layer = nn.Linear(4, 4)

    def hook(module: Any, keys: Any) -> None:
        module.weight.data.mul_(2)

    layer.register_load_state_dict_post_hook(hook)
    return chain(layer)


@animal
def hook_after_all_that_ties_by_value() -> nn.Module:
    model = chain(nn.Linear(4, 4))

    def hook(module: Any, keys: Any) -> None:
        module[2].weight.data.copy_(module[0].weight)

    model.register_load_state_dict_post_hook(hook)
    return model


@animal
def hook_that_breaks_the_rule() -> nn.Module:
    model = chain(nn.Linear(4, 4))
    model.register_load_state_dict_post_hook(lambda module, keys: 3)
    return model


@animal
def hook_after_that_forgives() -> nn.Module:
    model = chain(nn.Linear(4, 4))
    model.more = nn.Parameter(torch.zeros(4))
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    return model


@animal
def hook_after_that_complains() -> nn.Module:
    model = chain(nn.Linear(4, 4))
    model[1].register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.append("made.up"))
    return model


@animal
def hook_of_the_state_dict() -> nn.Module:
    model = chain(nn.Linear(4, 4))

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[prefix + "renamed"] = state.pop(prefix + "0.weight")

    model._register_state_dict_hook(hook)
    return model


@animal
def hook_after_that_reaches_the_next() -> nn.Module:
    """Which is loaded after it."""
    model = chain(nn.Linear(4, 4))

    def hook(module: nn.Module, keys: Any) -> None:
        with torch.no_grad():
            model[2].weight.zero_()
            model[1][0].bias.zero_()
            module.bias.add_(1)  # type: ignore[operator]

    model[0].register_load_state_dict_post_hook(hook)
    return model


@animal
def override_that_reaches_others() -> nn.Module:
    """The one that is loaded before it keeps that, the one after it does not."""
    model = chain(Override())

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        with torch.no_grad():
            model[0].weight.add_(model[0].weight)
            model[2].weight.zero_()

    model[1][0].register_load_state_dict_pre_hook(hook)
    return model
