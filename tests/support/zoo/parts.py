"""Modules and tensors with ways of their own to be loaded, of which models.py makes models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Maker = Callable[[], nn.Module]
ZOO: dict[str, Maker] = {}


def animal(make: Maker) -> Maker:
    ZOO[make.__name__] = make
    return make


def chain(middle: nn.Module) -> nn.Module:
    """With plain modules around it, so that what is confined to it can be told."""
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(middle, nn.Linear(4, 4)), nn.Linear(4, 4))


class Override(nn.Linear):
    """Changes the values, and takes an old name."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name] * 2
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[misc]


class ExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.extra = torch.zeros(3)

    def get_extra_state(self) -> torch.Tensor:
        return self.extra

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.extra = state.clone()
        with torch.no_grad():
            self.bias.fill_(float(state.sum()))


class NoExtraState(ExtraState):
    def get_extra_state(self) -> Any:
        return None


class WholeOverride(nn.Sequential):
    """Replaces names before torch looks at them."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        renamed = {name: tensor + 1 for name, tensor in state.items()}
        return super().load_state_dict(renamed, strict, assign)


class Parent(nn.Module):
    """Rewrites what its children get."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[prefix + "two.weight"] = torch.full((4,), 5.0)
        state.pop(prefix + "one.bias", None)
        super()._load_from_state_dict(state, prefix, *rest)


class Quantised(nn.Module):
    """Holds bytes and a scale, loads floats: as linear layers of quantisation libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.float() * self.scale

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "weight"
        if key in state and state[key].is_floating_point():
            self.scale = state[key].abs().max() / 127
            state[key] = (state[key] / self.scale).round().to(torch.int8)
            state[prefix + "scale"] = self.scale
        super()._load_from_state_dict(state, prefix, *rest)


class Carrying(nn.Parameter):
    """A parameter with attributes, as engines have them: its copy is torch's."""


class Doubling(torch.Tensor):
    """A tensor whose copy is not torch's."""

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return super().copy_(other * 2, non_blocking)


class Holding(nn.Module):
    def __init__(self, tensor: torch.Tensor, **others: torch.Tensor) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        made = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        self.weight = made
        for name, other in others.items():
            self.register_buffer(name, other)
        self.after = nn.Linear(4, 4)
