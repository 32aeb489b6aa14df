"""Shared by the tests of frameworks: `counted`, and that nothing is looked for on a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weightload
from weightload._api import files
from weightload._install import read_ahead
from weightload._into import load_model

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"


Counted = Callable[..., dict[str, int]]


def require(package: str) -> Any:
    """The package; without it the tests of a module are skipped, or fail where it has to be there."""
    if os.environ.get("WEIGHTLOAD_REQUIRE_FRAMEWORKS") == "1":
        return __import__(package)
    return pytest.importorskip(package, exc_type=ModuleNotFoundError, reason=f"no {package} here: make test-frameworks")


def files_of(folder: Path) -> list[Path]:
    """The checkpoint's files."""
    return sorted(folder.glob("*.safetensors"))


def same(ours: Any, theirs: Any) -> None:
    """Two models have the same tensors, bit for bit."""
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(name="counted")
def counted_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """``counted("transformers")`` installs weightload there; the dict says how often it was called, by function."""
    calls: dict[str, int] = {}

    def watch(module: Any, name: str, called: str) -> None:
        original = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            calls[called] = calls.get(called, 0) + 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    watch(files, "load_file", "load_file")
    watch(load_model, "load_model", "load_model")
    watch(read_ahead.SafeOpen, "__init__", "safe_open")

    def install(*frameworks: str) -> dict[str, int]:
        weightload.install(*frameworks)
        return calls

    yield install
    weightload.uninstall()
