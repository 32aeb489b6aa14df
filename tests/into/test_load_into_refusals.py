"""Before the first byte, load_into refuses by name targets that it cannot fill. It fills those that only look so."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import weightload
from weightload import errors

Make = Callable[[Path], torch.Tensor]


class Stubborn(torch.Tensor):
    """Takes no copy, like weights that were quantised by a library."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise NotImplementedError("no copies")
        return super().__torch_function__(func, types, args, kwargs or {})


class StubbornWrapper(torch.Tensor):
    """Wraps another tensor and takes no copy. No second one of its kind can be made."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> StubbornWrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func}")


def mapped_to_be_read(folder: Path) -> torch.Tensor:
    np.zeros(4, np.float32).tofile(folder / "numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.memmap(folder / "numbers", np.float32, mode="r"))


def anonymous_to_be_read(folder: Path) -> torch.Tensor:
    memory = mmap.mmap(-1, 8192, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(memory, dtype=torch.float32)[1024:1028]


def expanded(folder: Path) -> torch.Tensor:
    return torch.zeros(1).expand(4)


def freed(folder: Path) -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_off(folder: Path) -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(8)
    return tensor


def cut_off_strided(folder: Path) -> torch.Tensor:
    tensor = torch.zeros(8)[::2]
    tensor.untyped_storage().resize_(20)
    return tensor


def nested(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(2)])


def fake(folder: Path) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(4)


def guarded(folder: Path) -> torch.Tensor:
    tensor = torch.zeros(4)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


REFUSED: dict[str, tuple[Make, torch.dtype]] = {
    "meta": (lambda _: torch.zeros(4, device="meta"), torch.float32),
    "freed": (freed, torch.float32),
    "cut off": (cut_off, torch.float32),
    "cut off, strided": (cut_off_strided, torch.float32),
    "zeros without memory": (lambda _: torch._efficientzerotensor((4,)), torch.float32),
    "says that its memory is not to be written to": (guarded, torch.float32),
    "expanded": (expanded, torch.float32),
    "sparse": (lambda _: torch.zeros(4).to_sparse(), torch.float32),
    "compressed": (lambda _: torch.zeros(2, 2).to_sparse_csr(), torch.float32),
    "mkldnn": (lambda _: torch.zeros(2, 2).to_mkldnn(), torch.float32),
    "nested": (nested, torch.float32),
    "lazy parameter": (lambda _: nn.UninitializedParameter(), torch.float32),
    "fake": (fake, torch.float32),
    "a class that takes no copy": (lambda _: torch.zeros(4).as_subclass(Stubborn), torch.float32),
    "a parameter of it": (lambda _: nn.Parameter(torch.zeros(4).as_subclass(Stubborn)), torch.float32),
    "a wrapper that takes no copy": (lambda _: StubbornWrapper(torch.zeros(4)), torch.float32),
    "quantised, of half": (
        lambda _: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
        torch.float16,
    ),
    "no cast": (lambda _: torch.zeros(4), torch.float4_e2m1fn_x2),
    "mapped to be read": (mapped_to_be_read, torch.float32),
    "mapped to be read, cast": (mapped_to_be_read, torch.bfloat16),
    "read-only memory": (anonymous_to_be_read, torch.float32),
}


def file_tensor(dtype: torch.dtype, shape: tuple[int, ...] = (4,)) -> torch.Tensor:
    if dtype is torch.float4_e2m1fn_x2:
        return torch.ones(shape, dtype=torch.uint8).view(dtype)
    return torch.ones(shape, dtype=dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_the_first_byte(name: str, before: bool, tmp_path: Path) -> None:
    make, dtype = REFUSED[name]
    odd = make(tmp_path)
    known = not torch.nn.parameter.is_lazy(odd) and not odd.is_nested
    state = {"odd": file_tensor(dtype, tuple(odd.shape) if known else (4,)), "a": torch.ones(4), "b": torch.ones(4)}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state, path)
    target = {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.bfloat16)}
    target = {"odd": odd} | target if before else target | {"odd": odd}
    versions = {key: tensor._version for key, tensor in target.items()}
    with pytest.raises(weightload.WeightLoadError, match="'odd'") as caught:
        weightload.load_into(target, path)
    assert isinstance(caught.value, errors.StateDictError)
    assert (caught.value.tensor, caught.value.filename) in (("odd", str(path)), ("odd", None))
    assert not target["a"].any()
    assert not target["b"].any()
    assert versions == {key: tensor._version for key, tensor in target.items()}


def test_a_key_that_is_no_name_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"1": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match=r"cannot load into 1: must be a name \(str\), not a int"):
        weightload.load_into({1: torch.ones(3)}, tmp_path / "x.safetensors")  # type: ignore[dict-item]


def test_all_that_is_wrong_is_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({name: torch.ones(4) for name in "abcdefg"}, path)
    target = {
        "a": torch.zeros(4),
        "b": mapped_to_be_read(tmp_path),
        "c": mapped_to_be_read(tmp_path),
        "g": torch.zeros(4).as_subclass(Stubborn),
    }
    with pytest.raises(errors.StateDictError) as caught:
        weightload.load_into(target, path, strict=False)
    assert [name for name in "abcdefg" if f"'{name}'" in str(caught.value)] == ["b", "c", "g"]
    target |= {"d": torch.zeros(3), "e": torch.zeros(4, device="meta"), "more": torch.zeros(2), "h": freed(tmp_path)}
    with pytest.raises(errors.StateDictError) as caught:
        weightload.load_into(target, path)
    for words in (
        "size mismatch for d",
        "'e' has no memory",
        "'h' has no memory",
        "missing",
        "more",
        "unexpected",
        "f",
    ):
        assert words in str(caught.value)
    assert not target["a"].any()


def quantised_weight(folder: Path) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)


def in_inference_mode(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(4)


def half_in_inference_mode(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(4, dtype=torch.bfloat16)


def view_of_a_leaf(folder: Path) -> torch.Tensor:
    return torch.zeros(2, 4, requires_grad=True)[1]


def one_of_several_views(folder: Path) -> torch.Tensor:
    return torch.zeros(2, 4, requires_grad=True).unbind()[1]


def mapped_privately(folder: Path) -> torch.Tensor:
    np.zeros(4, np.float32).tofile(folder / "private")
    return torch.from_numpy(np.memmap(folder / "private", np.float32, mode="c"))


def view_of_a_checkpoint(folder: Path) -> torch.Tensor:
    safetensors.torch.save_file({"x": torch.zeros(4)}, folder / "other.safetensors")
    return safetensors.torch.load_file(folder / "other.safetensors")["x"]


class Carrying(nn.Parameter):
    """A parameter with attributes."""


FILLED: dict[str, Make] = {
    "plain": lambda _: torch.zeros(4),
    "in inference mode": in_inference_mode,
    "in inference mode, cast": half_in_inference_mode,
    "needs a gradient": lambda _: torch.zeros(4, requires_grad=True),
    "view of a leaf": view_of_a_leaf,
    "one of several views": one_of_several_views,
    "mapped privately": mapped_privately,
    "view of a checkpoint": view_of_a_checkpoint,
    "shared memory": lambda _: torch.zeros(4).share_memory_(),
    "of numpy": lambda _: torch.from_numpy(np.zeros(4, np.float32)),
    "lazily copied": lambda _: torch._lazy_clone(torch.zeros(4)),  # type: ignore[attr-defined]
    "negative": lambda _: torch.zeros(4, dtype=torch.complex64).conj().imag,
    "quantised": quantised_weight,
    "parameter with attributes": lambda _: Carrying(torch.zeros(4), requires_grad=False),
    "part of a larger one": lambda _: torch.zeros(9)[2:6],
    "storage that is longer": lambda _: torch.zeros(2, 4).t()[:, 1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILLED)
def test_what_only_looks_hard_is_filled(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"odd": torch.ones(4)}, path)
    odd = FILLED[name](tmp_path)
    before = None if odd.is_inference() else odd._version
    weightload.load_into({"odd": odd}, path)
    held = odd.dequantize() if odd.is_quantized else odd
    assert torch.equal(held.detach().float(), torch.ones(4))
    assert before is None or odd._version > before


def test_inference_tensors_of_a_module_inside_and_outside_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(dtype)
            overlapping = torch.zeros(6, dtype=dtype)
        state = {name: torch.ones(tensor.shape) for name, tensor in module.state_dict().items()}
        state["1.num_batches_tracked"] = torch.tensor(1)
        safetensors.torch.save_file(state, path)
        for inside in (False, True):
            with torch.inference_mode(inside):
                weightload.load_into(module, path)
            assert all(bool((tensor == 1).all()) for tensor in module.state_dict().values())
            with torch.inference_mode():
                module[0].weight.zero_()
                module[1].weight.zero_()
        safetensors.torch.save_file({"x": torch.ones(4), "y": torch.full((4,), 2.0)}, path)
        weightload.load_into({"x": overlapping[:4], "y": overlapping[2:]}, path)
        assert overlapping.tolist() == [1, 1, 2, 2, 2, 2]


def test_read_only_memory_of_a_module_that_takes_part(tmp_path: Path) -> None:
    """Its copy would end the process."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(1, 4))
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    model.bias = nn.Parameter(mapped_to_be_read(tmp_path), requires_grad=False)
    for load in (weightload.load_into, weightload.load_model):
        with pytest.raises(errors.StateDictError, match="'bias' cannot be loaded into: its memory is read-only"):
            load(model, path)  # type: ignore[operator]


def test_where_the_system_does_not_say_what_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read itself says so, of what is read into."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    monkeypatch.setattr("weightload._into.places.MAPS", str(tmp_path / "none"))
    target = torch.zeros(4)
    weightload.load_into({"a": target}, path)
    assert bool(target.all())


def test_many_maps_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"a{i}": torch.ones(3) for i in range(300)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    opened: list[str] = []

    def counting(path: Any, *rest: Any) -> Any:
        opened.append(path)
        return open(path, *rest)

    monkeypatch.setattr("weightload._into.places.open", counting, raising=False)
    weightload.load_into({name: torch.zeros(3) for name in state}, tmp_path / "m.safetensors")
    assert opened == ["/proc/self/maps"]
