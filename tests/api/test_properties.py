"""Whatever the file: the verdict of safetensors, and its bytes, on every way to load.

The examples are the same in every run; WEIGHTLOAD_PROPERTY_EXAMPLES=5000 tries as many others.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import BACKENDS, DTYPE_BITS, evict, file_bytes, start
from fuzz import verdicts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from property_files import File, damaged, files

import weightload
from weightload import errors
from weightload import settings as knobs
from weightload._checkpoint.selection import open_files

MORE_EXAMPLES = int(os.environ.get("WEIGHTLOAD_PROPERTY_EXAMPLES", "0"))
Tensors = dict[str, torch.Tensor]


def examples(count: int) -> settings:
    return settings(
        max_examples=MORE_EXAMPLES or count,
        derandomize=not MORE_EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties") / "any.safetensors"


def iterate(path: Path, backend: str, names: list[str] | None = None) -> Tensors:
    return dict(weightload.safetensors_weights_iterator([path], to_cpu=True, backend=backend, names=names))  # type: ignore[arg-type]


def ways(path: Path, content: bytes) -> list[tuple[str, Callable[[], Tensors]]]:
    """Every way to load the file, by name."""
    found: list[tuple[str, Callable[[], Tensors]]] = [("load", lambda: weightload.load(content))]
    for backend in BACKENDS:
        load_file = functools.partial(weightload.load_file, path, backend=backend)  # type: ignore[arg-type]
        found += [
            (f"load_file {backend}", load_file),
            (f"iterator {backend}", functools.partial(iterate, path, backend)),
        ]
    return found


def facts(tensors: Tensors) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


@examples(100)
@given(file=files())
def test_valid_files_give_the_same_tensors_on_every_way(path: Path, file: File) -> None:
    path.write_bytes(file.content)
    expected = facts(safetensors.torch.load_file(path))
    for name, way in ways(path, file.content):
        tensors = way()
        assert facts(tensors) == expected, name
        filled = [name for name in file.names if expected[name][2]]
        assert [name for name in tensors if expected[name][2]] == filled, f"{name}: not in the order of the offsets"
        for tensor in tensors.values():
            assert tensor.data_ptr() % tensor.element_size() == 0


@examples(100)
@given(file=files(dtypes=list(DTYPE_BITS)))
def test_valid_headers_say_what_safetensors_says(path: Path, file: File) -> None:
    path.write_bytes(file.content)
    assert verdicts.ours(file.content) == verdicts.theirs(file.content)
    with safetensors.safe_open(path, framework="pt") as handle:
        (opened,) = open_files([path])
        assert opened.metadata == handle.metadata()
        assert sorted(opened.names()) == sorted(handle.keys())


@examples(60)
@given(file=files(most=30_000), data=st.data())
def test_any_cutting_and_any_selection_give_the_same_bytes(path: Path, file: File, data: st.DataObject) -> None:
    path.write_bytes(file.content)
    names = [name for name in file.names if data.draw(st.booleans())]
    expected = {name: fact for name, fact in facts(safetensors.torch.load_file(path)).items() if name in names}
    sizes = {
        name: data.draw(st.integers(4096, 50_000), label=name) for name in ("block_bytes", "task_bytes", "window_bytes")
    }
    with knobs.override(threads=data.draw(st.integers(1, 3), label="threads"), **sizes):
        for backend in BACKENDS:
            assert facts(iterate(path, backend, names)) == expected, backend


@examples(60)
@given(file=files(most=30_000), data=st.data())
def test_what_a_consumer_writes_stays_and_shows_nowhere_else(path: Path, file: File, data: st.DataObject) -> None:
    path.write_bytes(file.content)
    expected = {name: fact[2] for name, fact in facts(safetensors.torch.load_file(path)).items()}
    sizes = {
        name: data.draw(st.integers(4096, 50_000), label=name) for name in ("block_bytes", "task_bytes", "window_bytes")
    }
    evict([path])
    with knobs.override(threads=data.draw(st.integers(1, 3), label="threads"), **sizes):
        for backend in BACKENDS:
            written = []
            for name, tensor in start([path], backend):
                if tensor.numel() == 0:
                    continue
                memory = tensor.view(-1).view(torch.uint8)
                assert memory.numpy().tobytes() == expected[name], f"{name} {backend}"
                written.append(memory.bitwise_not_())
            for memory, name in zip(written, (name for name in file.names if expected[name]), strict=True):
                assert memory.bitwise_not().numpy().tobytes() == expected[name], f"{name} {backend}: lost"


@examples(800)
@example(content=file_bytes(b"\xef\xbb\xbf{}"))
@example(content=file_bytes(b"{}\0x"))
@given(content=damaged())
def test_damaged_files_get_the_verdict_of_safetensors(content: bytes) -> None:
    assert verdicts.disagreement(content) is None


@examples(80)
@given(content=damaged())
def test_damaged_files_get_one_verdict_on_every_way(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    verdict = verdicts.ours(content)
    for name, way in ways(path, content):
        if isinstance(verdict, errors.HeaderError):
            with pytest.raises(type(verdict)) as caught:
                way()
            assert str(caught.value).replace(str(path), "<bytes>") == str(verdict), name
            assert caught.value.tensor == verdict.tensor, name
        else:
            assert isinstance(verdict, dict)
            with contextlib.suppress(errors.TensorError):  # what torch cannot hold
                found = {tensor: fact[2] for tensor, fact in facts(way()).items()}
                assert found == {tensor: fact[2] for tensor, fact in verdict.items()}, name
