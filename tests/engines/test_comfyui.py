"""The custom node of ComfyUI, on a stand-in for ``comfy.utils``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import STAND_INS, same_weights, some_tensors
from safetensors.torch import save_file

import weightload

FOLDER = Path(weightload.__file__).parent / "integrations" / "comfyui"


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A ``comfy.utils`` as it is before custom nodes are loaded."""
    monkeypatch.syspath_prepend(STAND_INS)
    yield importlib.import_module("comfy.utils")
    for name in ("comfy.utils", "comfy"):
        del sys.modules[name]


def load_node() -> Any:
    """The custom node, as ComfyUI loads folders: by path, under a name of its own."""
    spec = importlib.util.spec_from_file_location("custom_nodes.weightload", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    return node


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The files that weightload reads as a whole."""
    made: list[dict[str, Any]] = []
    original = weightload.load_file

    def counted(path: str, **named: Any) -> Any:
        made.append({"path": path, **named})
        return original(path, **named)

    monkeypatch.setattr(weightload, "load_file", counted)
    return made


@pytest.fixture
def file(tmp_path: Path) -> str:
    save_file(some_tensors(), tmp_path / "model.safetensors", metadata={"kind": "test"})
    return str(tmp_path / "model.safetensors")


def test_a_file_is_read_by_weightload(utils: Any, calls: list[dict[str, Any]], file: str) -> None:
    """Once, and what else the function does stays."""
    own = utils.load_torch_file(file)
    node = load_node()
    assert node.NODE_CLASS_MAPPINGS == {}
    assert calls == []
    ours, metadata = utils.load_torch_file(file, safe_load=True, return_metadata=True)
    assert same_weights(own, ours)
    assert metadata == {"kind": "test"}
    assert calls == [{"path": file, "device": torch.device("cpu"), "backend": "mmap"}]
    assert utils.annotated == [file, file]


def test_without_mapping(utils: Any, calls: list[dict[str, Any]], file: str) -> None:
    load_node()
    utils.DISABLE_MMAP = True
    assert same_weights(utils.load_torch_file(file), some_tensors())
    assert [call["backend"] for call in calls] == ["pread"]


def test_what_is_not_served_goes_to_safetensors(utils: Any, calls: list[dict[str, Any]], file: str) -> None:
    node = load_node()
    assert type(utils.safetensors.safe_open(file, framework="pt", device="cpu")).__module__ == node.__name__
    with utils.safetensors.safe_open(file, framework="np", device="cpu") as handle:
        assert type(handle.get_tensor(handle.keys()[0])).__module__ == "numpy"
    assert type(utils.safetensors.safe_open(file, framework="pt", device="mps")).__module__ != node.__name__
    with utils.safetensors.safe_open(file, framework="pt", device="cpu", backend="pread") as handle:
        handle.get_tensor(handle.keys()[0])
    assert [call["backend"] for call in calls] == ["pread"]


def test_other_files_and_other_names_are_left_alone(utils: Any, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    import safetensors

    load_node()
    load_node()  # the folder may be there twice
    torch.save({"a": torch.ones(2)}, tmp_path / "model.ckpt")
    assert utils.load_torch_file(str(tmp_path / "model.ckpt"))["a"].tolist() == [1, 1]
    assert calls == []
    assert utils.safetensors.torch is safetensors.torch
    assert safetensors.safe_open is not utils.safetensors.safe_open


def test_switched_off(utils: Any, calls: list[dict[str, Any]], file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLOAD_COMFYUI", "0")
    load_node()
    utils.load_torch_file(file)
    assert calls == []


def test_errors_are_those_that_comfyui_looks_for(utils: Any, file: str, tmp_path: Path) -> None:
    load_node()
    Path(file).write_bytes(Path(file).read_bytes()[:-1])
    with pytest.raises(ValueError, match="is incomplete"):
        utils.load_torch_file(file)
    Path(file).write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="is no safetensors file"):
        utils.load_torch_file(file)
    with pytest.raises(FileNotFoundError, match="missing"):
        utils.load_torch_file(str(tmp_path / "missing.safetensors"))


def test_a_version_that_does_not_fit_is_refused(utils: Any, caplog: pytest.LogCaptureFixture) -> None:
    del utils.safetensors
    load_node()
    assert not hasattr(utils, "safetensors")
    assert "does not know this version of ComfyUI" in caplog.text
