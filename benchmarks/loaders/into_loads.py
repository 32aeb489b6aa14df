"""Loads into parameters that are there already, which are made and touched before the clock starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

IntoLoad = Callable[[list[str], torch.nn.Module], None]


def module_of(files: list[str]) -> torch.nn.Module:
    """A module that has every tensor of the files as a parameter under its own name, with memory of its own."""
    from safetensors import safe_open

    root = torch.nn.Module()
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                tensor = torch.empty_like(opened.get_tensor(name), memory_format=torch.contiguous_format)
                tensor.view(-1).view(torch.uint8).fill_(0xA5)  # touched, and not what the file has
                add_parameter(root, name, tensor)
    return root


def add_parameter(root: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make a tensor a parameter of that name, with the modules that the name asks for."""
    *path, last = name.split(".")
    parent = root
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, torch.nn.Module())
        parent = parent.get_submodule(part)
    parent.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)}


def _load_state_dict(load_file: Any, files: list[str], module: torch.nn.Module) -> None:
    for file in files:  # strict only where one file has all
        module.load_state_dict(load_file(file), strict=len(files) == 1)


def safetensors_load_state_dict(files: list[str], module: torch.nn.Module) -> None:
    """A file after the other, as transformers and diffusers do."""
    from safetensors.torch import load_file

    _load_state_dict(load_file, files, module)


def weightload_load_state_dict(files: list[str], module: torch.nn.Module) -> None:
    """Do what ``safetensors_load_state_dict`` does, with no more than the import changed."""
    from weightload import load_file

    _load_state_dict(load_file, files, module)


def weightload_load_into(files: list[str], module: torch.nn.Module) -> None:
    import weightload

    weightload.load_into(module, files, show_progress=False)
