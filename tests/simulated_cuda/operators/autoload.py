"""Loads the operators of the simulated CUDA as soon as torch is imported, in every process of this environment.

A copy of this file lies in the environment's site-packages, and a .pth beside it imports it.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

OPERATORS = Path(__file__).with_name("simulated_cuda_operators.so")


class _LoaderOfTorch(importlib.abc.Loader):
    """Torch's own loader, and the operators behind it."""

    def __init__(self, under: importlib.abc.Loader) -> None:
        self._under = under

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._under.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._under  # for code that asks it for files
        self._under.exec_module(module)
        if OPERATORS.exists():
            ctypes.CDLL(str(OPERATORS), mode=ctypes.RTLD_GLOBAL)

    def __getattr__(self, name: str) -> object:
        return getattr(self._under, name)


class _FinderOfTorch(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderOfTorch(spec.loader)
        return spec


sys.meta_path.insert(0, _FinderOfTorch())
