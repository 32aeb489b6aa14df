"""Tensors of one name in several files: what an index decides, what ``duplicates`` says, and that ranks agree."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weightload
from weightload import errors
from weightload._checkpoint.selection import open_files, select_all

INDEX = "model.safetensors.index.json"


def write(folder: Path, name: str, **tensors: int) -> Path:
    """A file of vectors, each full of its number."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    safetensors.torch.save_file({key: torch.full((3,), float(value)) for key, value in tensors.items()}, path)
    return path


def write_index(folder: Path, name: str = INDEX, **weight_map: str) -> Path:
    content = {key: f"{shard}.safetensors" for key, shard in weight_map.items()}
    (folder / name).write_text(json.dumps({"weight_map": content}))
    return folder / name


def iterate(files: Any, **options: Any) -> dict[str, float]:
    pairs = list(weightload.safetensors_weights_iterator(files, to_cpu=True, **options))
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name: tensor[0].item() for name, tensor in pairs}


def into(files: Any, names: str = "", **options: Any) -> dict[str, float]:
    every = {name for file in open_files(files) for name in file.names()}
    target = {name: torch.zeros(3) for name in sorted(names or every)}
    report = weightload.load_into(target, files, strict=not names, **options)
    return {name: target[name][0].item() for name in report.loaded}


WAYS: dict[str, Callable[..., dict[str, float]]] = {
    "mmap": iterate,
    "pread": lambda files, **options: iterate(files, backend="pread", **options),
    "load_into": into,
    "load_into by a cast": lambda files, **options: into(files, **options),
}
way = pytest.fixture(params=WAYS.values(), ids=WAYS.keys())(lambda request: request.param)
Way = Callable[..., dict[str, float]]


@pytest.fixture
def reused(tmp_path: Path) -> list[Path]:
    """Shards, one of them of another checkpoint, and the index that gives each tensor to one."""
    files = [write(tmp_path, "own", a=1, b=2), write(tmp_path, "reused", b=-1, c=3, d=4)]
    write_index(tmp_path, a="own", b="own", c="reused")
    return files


def test_an_index_decides(reused: list[Path], way: Way) -> None:
    """In whatever order the files are listed, and also of what the index does not name, there is one."""
    assert weightload.resolve_safetensors_files(reused[0].parent) == [str(path) for path in reused]
    for files in (reused, reused[::-1]):
        for duplicates in ("error", "last"):
            assert way(files, duplicates=duplicates) == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_an_index_decides_by_names_of_the_cache(reused: list[Path], tmp_path: Path, way: Way) -> None:
    """Links to blobs, beside the link to an index."""
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for path in [*reused, reused[0].parent / INDEX]:
        (snapshot / path.name).symlink_to(path)
    links = [snapshot / path.name for path in reused]
    assert way(links) == {"a": 1, "b": 2, "c": 3, "d": 4}
    (snapshot / INDEX).unlink()
    with pytest.raises(errors.DuplicateTensor):
        way(links)


def test_an_index_above_the_files(tmp_path: Path, way: Way) -> None:
    files = [write(tmp_path / "parts", "own", a=1), write(tmp_path / "parts", "reused", a=2)]
    write_index(tmp_path, a="parts/own")
    with pytest.raises(errors.DuplicateTensor):  # it does not name the other
        way(files)
    write_index(tmp_path, a="parts/own", b="parts/reused")
    assert way(files) == {"a": 1}
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(errors.DuplicateTensor):
        way(files)


def test_what_an_index_does_not_decide(tmp_path: Path, way: Way) -> None:
    files = [write(tmp_path, "own", a=1, b=1), write(tmp_path, "reused", a=2, b=2, c=2), write(tmp_path, "patch", c=3)]
    with pytest.raises(errors.DuplicateTensor, match="`a`") as caught:
        way(files[:2])
    assert (caught.value.filename, caught.value.tensor) == (str(files[1]), "a")
    write_index(tmp_path, a="own", c="reused")  # says nothing of b
    with pytest.raises(errors.DuplicateTensor, match="`b`"):
        way(files[:2])
    with pytest.raises(errors.DuplicateTensor, match="`b`"):
        weightload.resolve_safetensors_files(tmp_path)
    write_index(tmp_path, a="own", b="own", c="reused")
    assert way(files[:2]) == {"a": 1, "b": 1, "c": 2}
    with pytest.raises(errors.DuplicateTensor, match="`c`"):  # nothing of a file of the caller's own
        way(files)
    assert way(files, duplicates="last") == {"a": 1, "b": 1, "c": 3}
    write_index(tmp_path, "other.safetensors.index.json", a="reused", b="own")
    with pytest.raises(errors.DuplicateTensor, match="`a`"):  # two that contradict each other
        way(files[:2])


def test_promises_are_kept(reused: list[Path]) -> None:
    write_index(reused[0].parent, a="own", b="own", c="own")
    with pytest.raises(errors.CheckpointError, match="`c` is not in this shard"):
        weightload.resolve_safetensors_files(reused[0].parent)


@pytest.mark.parametrize("content", ["{", '{"weight_map": {"b": "../own.safetensors"}}', "<html>"])
def test_an_index_that_is_bad_decides_nothing(reused: list[Path], way: Way, content: str) -> None:
    (reused[0].parent / INDEX).write_text(content)
    with pytest.raises(errors.CheckpointError) as caught:
        way(reused)
    assert caught.value.filename == str(reused[0].parent / INDEX)
    (reused[0].parent / INDEX).rename(reused[0].parent / f"._{INDEX}")
    with pytest.raises(errors.DuplicateTensor):
        way(reused)


def test_last_is_what_engines_iterators_have_in_the_end(tmp_path: Path, way: Way) -> None:
    contents: list[dict[str, int]] = [{"a": 1, "b": 1, "c": 1}, {"b": 2, "d": 2}, {"a": 3, "b": 3, "e": 3}]
    files = [write(tmp_path, str(number), **content) for number, content in enumerate(contents)]
    for order in itertools.permutations(range(3)):
        listed = [files[number] for number in order]
        theirs = {
            name: tensor[0].item() for path in listed for name, tensor in safetensors.torch.load_file(path).items()
        }
        assert way(listed, duplicates="last") == theirs
        with pytest.raises(errors.DuplicateTensor):
            way(listed)
    ours = list(iterate(files, duplicates="last"))
    assert ours == ["c", "d", "a", "b", "e"]  # each in the place of the file it is from


def test_one_file_listed_twice(tmp_path: Path, way: Way) -> None:
    path = write(tmp_path, "a", a=1)
    (tmp_path / "link.safetensors").symlink_to(path)
    for twice in ([path, path], [path, tmp_path / "link.safetensors"]):
        with pytest.raises(errors.DuplicateTensor, match="listed twice"):
            way(twice)
        assert way(twice, duplicates="last") == {"a": 1}


def test_only_names_that_are_wanted_matter(tmp_path: Path) -> None:
    files = [write(tmp_path, "1", a=1, b=1), write(tmp_path, "2", a=2, c=2)]
    assert iterate(files, names=["b", "c"]) == {"b": 1, "c": 2}
    assert iterate(files, names=lambda name: name != "a") == {"b": 1, "c": 2}
    assert iterate(files, names=["a"], duplicates="last") == {"a": 2}
    assert into(files, "bc") == {"b": 1, "c": 2}
    with pytest.raises(errors.DuplicateTensor):
        into(files, "ab")


def test_shapes_of_the_one_that_is_not_meant(tmp_path: Path) -> None:
    files = [write(tmp_path, "1", a=1), tmp_path / "2.safetensors"]
    safetensors.torch.save_file({"a": torch.zeros(9, dtype=torch.int8)}, files[1])
    assert into(files[::-1], duplicates="last") == {"a": 1}
    with pytest.raises(RuntimeError, match="size mismatch"):
        into(files, duplicates="last")
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.zeros(3))
    assert weightload.load_into(module, files[::-1], duplicates="last").loaded == ["a"]
    assert module.a[0] == 1
    with pytest.raises(errors.DuplicateTensor):
        weightload.load_into(module, files)
    write_index(tmp_path, a="1", b="2")
    assert weightload.load_into(module, files).bytes == 12


@pytest.mark.parametrize("value", ["first", "", None, 1, True])
def test_what_it_cannot_be(tmp_path: Path, way: Way, value: Any) -> None:
    files = [write(tmp_path, "1", a=1), write(tmp_path, "2", b=2)]
    for given in (files, files[:1]):
        with pytest.raises(ValueError, match="must be 'error' or 'last'"):
            way(given, duplicates=value)


def test_many_of_them(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(files):
        safetensors.torch.save_file({f"t{i}": torch.tensor([number], dtype=torch.uint8) for i in range(20_000)}, path)
    opened = open_files(files)
    assert list(map(len, select_all(opened, None, "last"))) == [0, 20_000]
    opened.clear()
    assert set(iterate(files, duplicates="last").values()) == {1}
