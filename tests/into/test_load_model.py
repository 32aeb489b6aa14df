"""load_model: what safetensors' own does to a module, and says of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weightload
from weightload import load_model


class Tied(torch.nn.Module):
    """Two names for one parameter, as language models have for embedding and output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 16, bias=False)
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight


class Untied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 16, bias=False)
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 16, bias=False)


class Larger(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(2, 2)


class Transposed(torch.nn.Module):
    """A parameter that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4).t())
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Renaming(torch.nn.Linear):
    """Takes part in its own loading."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "old" in state:
            state[prefix + "weight"] = state.pop(prefix + "old")
        super()._load_from_state_dict(state, prefix, *rest)


def norm() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3))


def half() -> torch.nn.Module:
    return Untied().half()


MODULES: list[Callable[[], torch.nn.Module]] = [Tied, Untied, Larger, Transposed, Renaming, norm, half]


def saved(model: torch.nn.Module, path: Path, drop: tuple[str, ...] = (), add: tuple[str, ...] = ()) -> Path:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in drop}
    state |= {name: torch.ones(2) for name in add}
    tied = safetensors.torch._find_shared_tensors(state)
    for names in tied:
        for name in sorted(names)[1:]:
            del state[name]
    safetensors.torch.save_file(state, path)
    return path


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("make", MODULES)
def test_the_same_parameters_as_with_safetensors(
    make: Callable[[], torch.nn.Module], backend: Any, tmp_path: Path
) -> None:
    path = saved(make(), tmp_path / "m.safetensors")
    ours, theirs = make(), make()
    assert load_model(ours, path, backend=backend) == safetensors.torch.load_model(theirs, path) == (set(), [])
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("saver", MODULES)
@pytest.mark.parametrize("loader", MODULES)
@pytest.mark.parametrize(("drop", "add"), [((), ()), (("body.bias", "0.bias", "steps"), ("more", "and.more"))])
def test_what_is_missing_and_what_is_not_expected(
    saver: Callable[[], torch.nn.Module], loader: Callable[[], torch.nn.Module],
    drop: tuple[str, ...], add: tuple[str, ...], tmp_path: Path,
) -> None:  # fmt: skip
    """Any file into any module: the same answer from both, or an error from both with the same names."""
    path = saved(saver(), tmp_path / "m.safetensors", drop, add)
    blank = loader()
    for strict in (False, True):
        ours, theirs = copy.deepcopy(blank), copy.deepcopy(blank)
        try:
            missing, unexpected = safetensors.torch.load_model(theirs, path, strict=strict)
        except RuntimeError as error:
            words = str(error)
            with pytest.raises(RuntimeError) as caught:
                load_model(ours, path, strict=strict)
            if "size mismatch" not in words:
                assert str(caught.value) == words
            continue
        got = load_model(ours, path, strict=strict)
        assert (got[0], sorted(got[1])) == (missing, sorted(unexpected))
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_what_an_instance_overrides_counts(tmp_path: Path) -> None:
    """Replacing a method of one model is how people map names."""
    path = saved(Untied(), tmp_path / "m.safetensors")
    ours, theirs = Untied(), Untied()
    calls = []
    for model in (ours, theirs):
        plain = model.load_state_dict

        def doubled(state: dict[str, Any], strict: bool = True, plain: Any = plain) -> Any:
            calls.append(strict)
            return plain({name: tensor * 2 for name, tensor in state.items()}, strict=strict)

        model.load_state_dict = doubled  # type: ignore[assignment,method-assign]
    assert load_model(ours, path) == safetensors.torch.load_model(theirs, path)
    assert len(calls) == 2
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_the_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is checked is the one that is loaded, even if another file gets the name meanwhile."""
    path = saved(Untied(), tmp_path / "m.safetensors")
    opened = []
    opener = weightload.load_model.__globals__["open_files"]
    monkeypatch.setitem(
        weightload.load_model.__globals__, "open_files", lambda paths: opened.append(paths) or opener(paths)
    )
    load_model(Untied(), path)
    assert opened == [[path]]


def test_a_strict_failure_loads_nothing(tmp_path: Path) -> None:
    path = saved(Untied(), tmp_path / "m.safetensors", drop=("body.bias",))
    model = Untied()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(weightload.WeightLoadError, match=r'Missing key\(s\) in state_dict: "body.bias"'):
        load_model(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_are_read_in_place(tmp_path: Path) -> None:
    path = saved(Tied(), tmp_path / "m.safetensors")
    model = Tied()
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    load_model(model, path)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.requires_grad


def test_a_model_without_memory_is_left_to_torch(tmp_path: Path) -> None:
    path = saved(Untied(), tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Untied()
    with pytest.warns(UserWarning, match="no-op"):
        load_model(model, path)
    assert model.body.weight.is_meta


def test_errors_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        load_model(Untied(), tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"short")
    with pytest.raises(weightload.HeaderError):
        load_model(Untied(), tmp_path / "bad")
    with pytest.raises(ValueError, match="backend"):
        load_model(Untied(), saved(Untied(), tmp_path / "m.safetensors"), backend="x")  # type: ignore[arg-type]
