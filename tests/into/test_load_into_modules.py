"""load_into a module is load_state_dict of the same tensors, whatever the module makes of its loading, or an error that
leaves it as it was."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.zoo.models import ZOO
from torch import nn

import weightload
from weightload import errors

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of old ways that are still met

REFUSED = {"lazy", "without_memory"}
# How a checkpoint differs from what the module wants.
FILES = ("whole", "less", "more", "old norms", "odd shape", "names below nothing")


def all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Bytes of every tensor, in the state_dict or not, and how often it was changed."""
    seen: dict[str, Any] = {}
    for name, tensor in all_tensors(model):
        if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
            seen[name] = tensor.device
            continue
        version = None if tensor.is_inference() else tensor._version
        plain = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
        bits = (
            plain.as_subclass(torch.Tensor).clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        )
        seen[name] = (version, hashlib.sha1(bits.numpy().tobytes()).hexdigest(), tensor.shape, tensor.dtype)
    return seen


def values(model: nn.Module) -> dict[str, Any]:
    more = {
        f"extra {name}": module.extra.tolist() for name, module in model.named_modules() if hasattr(module, "extra")
    }
    return {name: facts[1:] for name, facts in fingerprint(model).items() if isinstance(facts, tuple)} | more


def checkpoint_for(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Make a checkpoint with the model's names, as torch knows them before any hook."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = model.state_dict()
    for name, tensor in own.items():
        if not isinstance(tensor, torch.Tensor) or torch.nn.parameter.is_lazy(tensor):
            continue
        dtype = torch.float32 if tensor.is_floating_point() or tensor.is_quantized else tensor.dtype
        state[name] = (torch.rand(tensor.shape, generator=generator) * 9 + 1).to(dtype)
    names = list(state)
    if kind == "less":
        for name in names[1::3]:
            del state[name]
    elif kind == "more":
        state |= {"0.more": torch.ones(2), "another.thing": torch.ones(2), "1.0._extra_state": torch.ones(3)}
    elif kind == "old norms":
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        state |= {"1.0.running_mean": torch.ones(4)} if "1.0.weight" in state and len(names) < 9 else {}
    elif kind == "odd shape":
        state[names[-1]] = torch.ones(3, 7)
    elif kind == "names below nothing":
        state["absent.weight"] = torch.ones(2)
    return state


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name]()


def by_torch(model: nn.Module, state: dict[str, torch.Tensor], strict: bool) -> tuple[list[str], list[str]] | None:
    if any(tensor.is_inference() for tensor in model.parameters()):
        with torch.inference_mode():
            told = model.load_state_dict(state, strict=strict)
    else:
        told = model.load_state_dict(state, strict=strict)
    return in_state_dict(told.missing_keys), in_state_dict(told.unexpected_keys)


def in_state_dict(names: list[str]) -> list[str]:
    """Return the state_dict's names for the tensors that load_state_dict calls by these names."""
    return sorted(name.replace("_checkpoint_wrapped_module.", "") for name in names)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("kind", "parts"), [*((kind, 1) for kind in FILES), ("whole", 3), ("more", 3)])
@pytest.mark.parametrize("name", ZOO)
def test_as_load_state_dict_or_not_at_all(name: str, kind: str, strict: bool, parts: int, tmp_path: Path) -> None:
    ours, theirs = make(name), make(name)
    state = checkpoint_for(ours, kind)
    paths = []
    for part in range(parts):
        some = dict(list(state.items())[part::parts])
        paths.append(tmp_path / f"{part}.safetensors")
        safetensors.torch.save_file(some, paths[-1])
    loaded = {key: tensor for path in paths for key, tensor in safetensors.torch.load_file(path).items()}
    before = fingerprint(ours)
    expected: Any
    try:
        expected = by_torch(theirs, loaded, strict)
    except Exception as error:
        expected = error
    try:
        report = weightload.load_into(ours, paths, strict=strict)
    except weightload.WeightLoadError as error:
        if not isinstance(expected, Exception):
            assert name in REFUSED
        if "partly loaded" not in str(error):
            assert fingerprint(ours) == before
        return
    except (RuntimeError, AssertionError) as error:  # of the module's own code
        failed = repr(error)
    else:
        failed = None
    if failed is not None:
        assert failed == repr(expected)
        return
    if isinstance(expected, Exception):  # a tied name stands for the others
        assert name.startswith(("tied", "shared"))
        return
    assert name not in REFUSED
    assert values(ours) == values(theirs)
    tied = name.startswith(("tied", "shared"))
    if not tied:
        assert (in_state_dict(report.missing), in_state_dict(report.unexpected)) == expected
    assert set(report.loaded) <= set(loaded)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "frozen_in_inference_mode"])  # torch cannot, ours can
def test_load_model_as_safetensors(name: str, kind: str, strict: bool, tmp_path: Path) -> None:
    ours, theirs = make(name), make(name)
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(checkpoint_for(ours, kind), path)
    expected: Any
    try:
        expected = safetensors.torch.load_model(theirs, path, strict)
    except Exception as error:
        expected = error
    if isinstance(expected, Exception):
        with pytest.raises((type(expected), errors.StateDictError)) as caught:
            weightload.load_model(ours, path, strict)
        assert str(caught.value) == str(expected) or "size mismatch" in str(caught.value)
        return
    missing, unexpected = weightload.load_model(ours, path, strict)
    assert (missing, sorted(unexpected)) == (expected[0], sorted(expected[1]))
    assert values(ours) == values(theirs)


def test_what_takes_part_is_told(tmp_path: Path) -> None:
    """And the rest is read in place."""
    for name, parts, in_place in (
        ("plain", [], 8),
        ("batch_norm", [], 11),
        ("weight_norm", [], 9),
        ("wrapped_for_checkpointing", [], 11),
        ("wrapped_root", [], 8),
        ("wrapped_twice_and_within", [], 14),
        ("wrapped_with_a_hook", ["1.0"], 6),
        ("wrapped_with_a_hook_after", [], 8),
        ("weight_norm_that_is_wrapped", [], 9),
        ("wrapped_and_compiled", [], 10),
        ("override_of_the_class", ["1.0"], 6),
        ("override_of_the_root", [""], 0),
        ("hook_before_all", [""], 0),
        ("hook_after", [], 8),
        ("extra_state", ["1.0"], 6),
        ("observers", ["1", "2", "3"], 2),
        ("whole_override", [""], 0),
        ("whole_override_below_the_root", [], 8),  # torch does not call it either
    ):
        model = make(name)
        state = checkpoint_for(model, "whole")
        safetensors.torch.save_file(state, tmp_path / "m.safetensors")
        report = weightload.load_into(model, tmp_path / "m.safetensors")
        assert (report.took_part, report.in_place) == (parts, in_place), name
        assert sorted(report.loaded) == sorted(state)
        assert report.bytes == sum(tensor.nbytes for tensor in state.values())


def subclasses(kind: type) -> set[type]:
    below = set(kind.__subclasses__())
    return below.union(*map(subclasses, below)) if below else below


def test_torch_has_no_other_modules_that_load_themselves() -> None:
    """Those whose loading is known to be copying, and those that get their part. A new one is to be looked at."""
    methods = ("_load_from_state_dict", "load_state_dict", "set_extra_state")
    found = {
        f"{kind.__qualname__}.{name}"
        for kind in subclasses(nn.Module)
        for name in methods
        if name in vars(kind) and kind.__module__.startswith("torch.nn.")
    }
    assert found == {"_NormBase._load_from_state_dict", "_InstanceNorm._load_from_state_dict"}


def test_a_module_class_that_was_patched_loads_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that was patched loads in its own way. Accelerators' libraries patch torch's, for all modules at once."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(nn.Linear(2, 2).state_dict(), path)
    torchs = nn.Module._load_from_state_dict

    def mine(self: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        torchs(self, {name: tensor * 0 + 7 for name, tensor in state.items()}, prefix, *rest)

    monkeypatch.setattr(nn.Module, "_load_from_state_dict", mine)
    model = nn.Linear(2, 2)
    assert weightload.load_into(model, path).took_part == [""]
    assert bool((model.weight == 7).all())


def test_an_override_whose_answer_is_no_list_of_names(tmp_path: Path) -> None:
    class Silent(nn.Linear):
        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            self.told = strict
            super().load_state_dict(state, strict, assign)

    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2, 2)}, path)
    model = Silent(2, 2)
    with pytest.raises(errors.StateDictError, match="Missing key"):
        weightload.load_into(model, path)
    report = weightload.load_into(model, path, strict=False)
    assert (model.told, report.missing, report.loaded) == (False, [], ["weight"])


def test_modules_that_swap_their_tensors(tmp_path: Path) -> None:
    """A mode of torch: tensors of other classes have a way of their own to load."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for name in ("plain", "batch_norm", "weight_norm", "spectral_norm_of_old", "carrying_parameter"):
            ours, theirs = make(name), make(name)
            state = checkpoint_for(ours, "whole")
            safetensors.torch.save_file(state, tmp_path / "m.safetensors")
            report = weightload.load_into(ours, tmp_path / "m.safetensors")
            theirs.load_state_dict(state)
            assert {n: v[0] for n, v in values(ours).items()} == {n: v[0] for n, v in values(theirs).items()}
            assert report.took_part == {"spectral_norm_of_old": ["1.0"], "carrying_parameter": [""]}.get(name, [])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
