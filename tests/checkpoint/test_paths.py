"""Every call takes the same kinds of values for a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tensors

import weightload
from weightload._base.paths import path_list

NAME = "model.safetensors"


class Pathlike:
    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        return self.path


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Buffer(torch.zeros(3, dtype=torch.uint8))


FORMS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "Path": Path,
    "bytes": os.fsencode,
    "PathLike of str": Pathlike,
    "PathLike of bytes": lambda path: Pathlike(os.fsencode(path)),
}
ONE: dict[str, Callable[[Any], Iterable[str]]] = {
    "iterator": lambda path: dict(weightload.safetensors_weights_iterator(path, to_cpu=True)),
    "load_file": weightload.load_file,
    "safe_open": lambda path: weightload.safe_open(path, "pt").keys(),
    "safe_open prefetch": lambda path: dict(weightload.safe_open(path, "pt").prefetch()),
    "load_model": lambda path: set(Module().state_dict()) - weightload.load_model(Module(), path)[0],
    "load_into": lambda path: weightload.load_into({"a": torch.zeros(3, dtype=torch.uint8)}, path).loaded,
    "resolve": lambda path: dict(_of(weightload.resolve_safetensors_files(path))),
    "resolve a directory": lambda path: dict(_of(weightload.resolve_safetensors_files(_parent(path)))),
}
SEVERAL = {name: ONE[name] for name in ("iterator", "load_into", "resolve")}


def _of(files: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
    assert all(type(file) is str for file in files)
    return weightload.safetensors_weights_iterator(files, to_cpu=True)


def _parent(path: Any) -> Any:
    if isinstance(path, Pathlike):
        return Pathlike(os.path.dirname(path.path))
    return path.parent if isinstance(path, Path) else os.path.dirname(path)


@pytest.fixture(params=["plain", "ünï çødé", "undecodable \udcff\udc80"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / request.param
    folder.mkdir()
    return str(write_tensors(folder / NAME, [("a", "U8", [3])]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", ONE)
def test_every_form_of_a_path_in_every_call(path: str, call: str, form: str) -> None:
    assert list(ONE[call](FORMS[form](path))) == ["a"]


@pytest.mark.parametrize("form", FORMS)
def test_safe_open_for_another_framework(tmp_path: Path, form: str) -> None:
    """Which is safetensors' own, and takes no bytes itself."""
    path = FORMS[form](str(write_tensors(tmp_path / NAME, [("a", "U8", [3])])))
    for handle in (weightload.safe_open(path, "np"), weightload.safe_open(filename=path, framework="np")):
        assert isinstance(handle.get_tensor("a"), np.ndarray)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("collect", [list, tuple, set, frozenset, iter, lambda paths: (path for path in paths)])
@pytest.mark.parametrize("call", SEVERAL)
def test_several_paths(tmp_path: Path, call: str, collect: Callable[[Any], Any], form: str) -> None:
    paths = [str(write_tensors(tmp_path / f"{name}.safetensors", [(name, "U8", [3])])) for name in ("a",)]
    assert list(SEVERAL[call](collect([FORMS[form](path) for path in paths]))) == ["a"]


def test_the_order_of_several() -> None:
    assert path_list(["b", b"a", Path("c")]) == ["b", "a", "c"]
    assert path_list({"b10", b"b9", Path("a")}) == ["a", "b9", "b10"]
    assert path_list({"b": 1, "a": 2}.keys()) == ["b", "a"]


@pytest.mark.parametrize("call", ["iterator", "resolve"])
def test_no_files(call: str) -> None:
    """A load of no files gives nothing, as it does with engines' iterators."""
    assert list(SEVERAL[call]([])) == []
    assert weightload.load_into({}, []).loaded == []
    with pytest.raises(weightload.WeightLoadError, match="missing"):
        weightload.load_into({"a": torch.zeros(3)}, [])


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "None"), (3, "3"), (True, "True"), (1.5, "1.5"), (bytearray(b"x"), "bytearray"), (object, "object"),
     (Pathlike(3), "Pathlike"), (Unprintable(), "Unprintable"), ([], r"\[\]"), (["x" * 10**6], "xxx")],
)  # fmt: skip
@pytest.mark.parametrize("call", ONE)
def test_what_is_no_path(call: str, value: Any, shown: str) -> None:
    """A TypeError that shows it, as a path or as one of several."""
    if call == "resolve a directory":
        return
    if not isinstance(value, list):
        with pytest.raises(TypeError, match=shown):
            ONE[call](value)
    if call in SEVERAL or isinstance(value, list):
        wrapped = [value] if call in SEVERAL else value
        with pytest.raises(TypeError, match=shown) as caught:
            SEVERAL.get(call, ONE[call])(wrapped)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("form", ["str", "bytes"])
@pytest.mark.parametrize("call", ONE)
def test_names_that_no_file_can_have(call: str, form: str) -> None:
    with pytest.raises(ValueError, match="null byte"):
        ONE[call](FORMS[form]("a/b\0.safetensors") if call != "resolve a directory" else FORMS[form]("a\0/b"))
    with pytest.raises(FileNotFoundError):
        ONE[call](FORMS[form](""))
    if call in SEVERAL:
        with pytest.raises(FileNotFoundError, match="the path is empty"):
            SEVERAL[call]([FORMS[form]("")])


def test_an_error_of_a_generator_is_its_own() -> None:
    def paths() -> Iterator[str]:
        yield "a"
        raise TypeError("of the generator")

    for call in SEVERAL.values():
        with pytest.raises(TypeError, match=r"^of the generator$"):
            call(paths())


def test_a_subfolder_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    path = write_tensors(tmp_path / "unet" / NAME, [("a", "U8", [3])])
    for form in FORMS.values():
        assert weightload.resolve_safetensors_files(form(str(tmp_path)), form("unet")) == [str(path)]
    with pytest.raises(ValueError, match="not an absolute path"):
        weightload.resolve_safetensors_files(tmp_path, "/unet")
