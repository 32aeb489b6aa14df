"""Loads in parts, of which an engine reads what it narrows tensors to: what is read, when, and that it is right."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import open_checkpoints, thread_count
from engine_support import same_bits, same_weights
from safetensors.torch import save_file

import weightload
from weightload import _C
from weightload._parts.lazy import LazyTensor
from weightload.integrations import in_parts
from weightload.integrations.in_name_order import in_name_order
from weightload.integrations.in_parts import InParts

CPU = torch.device("cpu")
LAYERS = 6
ROWS, COLUMNS = 256, 128  # 128 KiB of a layer's matrix
HALF = ROWS * COLUMNS * 4 // 2


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Two matrices and a small tensor for each layer, and two tensors that a model has once."""
    generator = torch.Generator().manual_seed(0)
    found = {"embed": torch.randn(ROWS, COLUMNS, generator=generator), "norm": torch.randn(9, generator=generator)}
    for layer in range(LAYERS):
        found[f"layers.{layer}.a"] = torch.randn(ROWS, COLUMNS, generator=generator)
        found[f"layers.{layer}.b"] = torch.randn(COLUMNS, ROWS, generator=generator)
        found[f"layers.{layer}.scale"] = torch.randn(3, generator=generator).double()
    return found


@pytest.fixture
def files(tensors: dict[str, torch.Tensor], tmp_path: Path) -> list[str]:
    """Two, with three layers each."""
    paths = [str(tmp_path / f"{number}.safetensors") for number in (1, 2)]
    late = {name for name in tensors if name[7:8] in "345" and name.startswith("layers.")}
    save_file({name: tensor for name, tensor in tensors.items() if name not in late}, paths[0])
    save_file({name: tensor for name, tensor in tensors.items() if name in late}, paths[1])
    return paths


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """The second half of the rows, copied as an engine copies it."""
    half = tensor.shape[0] // 2
    return torch.zeros(half, *tensor.shape[1:], dtype=tensor.dtype).copy_(tensor.narrow(0, half, half))


def columns(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.shape[1] // 2
    return torch.zeros(tensor.shape[0], half, dtype=tensor.dtype).copy_(tensor[:, :half])


def take(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Take the part of a tensor that a rank wants: rows of some, columns of others, all of the small ones."""
    if name.endswith((".a", "embed")):
        return rows(tensor)
    return columns(tensor) if name.endswith(".b") else tensor.clone()


def taken(weights: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in weights:
        found[name] = take(name, tensor)
        del tensor
    return found


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_what_one_layer_wants_is_read_ahead_of_the_next(
    tensors: dict[str, torch.Tensor], files: list[str], backend: Any
) -> None:
    load = InParts(files, CPU, backend)
    found = taken(iter(load))
    assert same_weights(found, {name: take(name, tensor) for name, tensor in tensors.items()})
    small = 9 * 4 + LAYERS * 3 * 8
    columns_ahead = HALF if backend == "pread" else 2 * HALF  # of mapped files they are views
    assert load.counts.asked == 3 * HALF  # embed, and the first layer
    assert load.counts.ahead == small + (LAYERS - 1) * (HALF + columns_ahead)
    assert load.counts.checkpoint == sum(tensor.nbytes for tensor in tensors.values())
    assert load.counts.starts == 2


def test_the_order_is_that_of_whole_tensors(files: list[str]) -> None:
    whole = in_name_order(weightload.safetensors_weights_iterator(files, to_cpu=True), files)
    assert [name for name, _ in InParts(files, CPU)] == [name for name, _ in whole]


def test_what_nobody_looks_at_is_not_read(files: list[str]) -> None:
    """Nor that of other layers, as of experts of other ranks."""
    load = InParts(files, CPU, "pread")
    for name, tensor in load:
        if name.endswith(".b"):
            columns(tensor)
        del tensor
    assert load.counts.asked == HALF
    assert load.counts.ahead == 9 * 4 + LAYERS * 3 * 8 + (LAYERS - 1) * HALF


def test_a_part_without_elements(tensors: dict[str, torch.Tensor], files: list[str]) -> None:
    """A rank may want no elements of a tensor: the last rank does where there is not enough for all."""
    load = InParts(files, CPU, "pread")
    for _, tensor in load:
        assert tensor[:0].clone().shape[0] == 0
    assert load.counts.asked == 0
    assert load.counts.starts == 1


def test_a_layer_that_wants_something_else(tensors: dict[str, torch.Tensor], files: list[str]) -> None:
    """Other rows than were read ahead, all of it, and something that nobody expected of a lazy tensor."""
    for name, tensor in InParts(files, CPU, "pread"):
        expected = tensors[name]
        if name == "layers.3.a":
            assert same_bits(tensor[: ROWS // 2].clone(), expected[: ROWS // 2])
        elif name == "layers.4.a":
            assert same_bits(tensor.clone(), expected)
        elif name == "layers.5.a":
            assert same_bits(torch.from_numpy(tensor.numpy()), expected)
        else:
            assert same_bits(take(name, tensor), take(name, expected))


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_several_parts_of_a_tensor(tensors: dict[str, torch.Tensor], files: list[str], backend: Any) -> None:
    """A rank wants half of each of two weights that a checkpoint has as one. In a mapped file, what lies between is
    read as well, so that the tensor is a view."""
    load = InParts(files, CPU, backend)
    for name, tensor in load:
        if not name.endswith(".a"):
            del tensor
            continue
        for at in (0, 128):
            assert same_bits(tensor.narrow(0, at, 128).narrow(0, 64, 64).clone(), tensors[name][at + 64 : at + 128])
    assert load.counts.asked == HALF
    assert load.counts.ahead == 9 * 4 + LAYERS * 3 * 8 + (LAYERS - 1) * (HALF if backend == "pread" else HALF * 3 // 2)


def test_what_was_read_ahead_for_less(tmp_path: Path) -> None:
    """Tensors that wait as their names come later, of which more is known to be wanted by then."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(5):
        tensors[f"layers.{layer}.a"] = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16()
        tensors[f"layers.{layer}.z"] = torch.randn(
            ROWS, COLUMNS, generator=generator
        )  # in the file before all of these
        if layer > 1:
            tensors[f"layers.{layer}.new"] = torch.randn(ROWS, COLUMNS, generator=generator).double()
    # By dtype they are in the file: all of "new", of "z", of "a".
    file = str(tmp_path / "mixed.safetensors")
    save_file(tensors, file)
    load = InParts([file], CPU, "pread")
    for name, tensor in load:
        assert same_bits(rows(tensor), rows(tensors[name]))
        if name == "layers.1.z":
            assert same_bits(tensor[:9].clone(), tensors[name][:9])
    assert load.counts.starts == 2  # once more when "new" is known


def test_a_loader_that_looks_later(tensors: dict[str, torch.Tensor], files: list[str]) -> None:
    """When it has seen two layers more, say: it is learned from all the same."""
    load = InParts(files, CPU, "pread")
    waiting: list[tuple[str, torch.Tensor]] = []
    for found in load:
        waiting.append(found)
        del found
        if len(waiting) > 6:
            name, tensor = waiting.pop(0)
            assert same_bits(take(name, tensor), take(name, tensors[name]))
    for name, tensor in waiting:
        assert same_bits(take(name, tensor), take(name, tensors[name]))
    assert load.counts.asked == (1 + 2 * 3) * HALF  # of three layers


def test_tensors_outlive_the_load(tensors: dict[str, torch.Tensor], files: list[str]) -> None:
    """A list of them is nothing to learn from, and each is read when it is looked at."""
    load = InParts(files, CPU, "pread")
    weights = dict(load)
    assert load.counts.asked == 0
    assert {name for name, tensor in weights.items() if isinstance(tensor, LazyTensor)} == {
        name for name in tensors if not name.endswith(("norm", "scale"))
    }
    assert same_weights(taken(iter(weights.items())), {name: take(name, tensor) for name, tensor in tensors.items()})
    assert load.counts.starts == 1


def test_names_and_a_name_in_two_files(tensors: dict[str, torch.Tensor], files: list[str]) -> None:
    last = torch.ones(ROWS, COLUMNS)
    save_file({"embed": last, "layers.9.a": last.clone()}, files[1])
    found = list(InParts(files, CPU, names=lambda name: name.endswith(("embed", ".a"))))
    assert [name for name, _ in found] == ["layers.0.a", "layers.1.a", "layers.2.a", "embed", "layers.9.a"]
    assert same_bits(found[3][1].clone(), last)


def test_settings_hold_for_all_that_is_read(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    start, one = in_parts.start, in_parts.TensorSlice

    def seeing(function: Any) -> Any:
        def see(*arguments: Any, **named: Any) -> Any:
            seen.add((function, weightload.settings.current().threads))
            return function(*arguments, **named)

        return see

    monkeypatch.setattr(in_parts, "start", seeing(start))
    monkeypatch.setattr(in_parts, "TensorSlice", seeing(one))
    for _, tensor in InParts(files, CPU, values={"threads": 3}):
        tensor.clone()
        assert weightload.settings.current().threads != 3
    assert seen == {(start, 3), (one, 3)}


def test_a_file_that_is_replaced_meanwhile(tensors: dict[str, torch.Tensor], files: list[str], tmp_path: Path) -> None:
    """The load reads those that it has opened, also where it begins to read anew."""
    weights = iter(InParts(files, CPU, "pread"))
    found = dict([next(weights)])
    for file in files:
        other = tmp_path / "other"
        save_file({name: torch.zeros_like(tensor) for name, tensor in weightload.load_file(file).items()}, other)
        other.rename(file)
    found = {name: take(name, tensor) for name, tensor in found.items()} | taken(weights)
    assert same_weights(found, {name: take(name, tensor) for name, tensor in tensors.items()})


def test_a_read_that_fails(files: list[str]) -> None:
    """Ahead as well as when it is asked for: an error, at the latest by the tensor that it concerns."""
    small = {"window_bytes": 4096, "block_bytes": 4096, "task_bytes": 4096}  # the rest is not all there by then
    for after in (0, 4):
        weights = iter(InParts(files, CPU, "pread", values=small))
        done = 0
        with pytest.raises(weightload.ReadError, match=r"\.safetensors") as failed:
            for name, tensor in weights:
                if done == after:
                    _C.arm_fault("error", 0, 1000, 5)
                take(name, tensor)
                done += 1
        _C.disarm_fault()
        assert failed.value.errno == 5
        # Drop the error and the tensor, which keep a file open.
        name = tensor = failed = weights = None  # type: ignore[assignment]
        gc.collect()


def test_leaving_early(files: list[str]) -> None:
    """A load that was left early needs no thread and no file."""
    load = InParts(files, CPU)
    weights = iter(load)
    next(weights)
    assert open_checkpoints() != []
    weights.close()  # type: ignore[attr-defined]
    assert thread_count() == 0
    assert open_checkpoints() == []


def test_packed_dtypes_come_whole(tmp_path: Path) -> None:
    """torch counts their last dimension otherwise."""
    file = str(tmp_path / "packed.safetensors")
    packed = torch.arange(1 << 17).to(torch.uint8).reshape(512, 256).view(torch.float4_e2m1fn_x2)
    save_file({"layers.0.a": packed}, file)
    ((_, tensor),) = InParts([file], CPU)
    assert type(tensor) is torch.Tensor
    assert same_bits(tensor, packed)


@pytest.mark.simulated
@pytest.mark.parametrize("seed", range(3))
def test_an_accelerator(tensors: dict[str, torch.Tensor], files: list[str], simulated: Any, seed: int) -> None:
    """Memory there is that of the parts, and of a block or two."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    device = torch.device(kind.type, 0)
    small = {"pinned_bytes": 64 << 10, "slot_bytes": 16 << 10, "device_block_bytes": 64 << 10}
    load = InParts(files, device, values=small)
    found = {}
    for name, tensor in load:
        assert tensor.device == device
        assert tensor.is_cpu is False
        part = tensor
        if tensor.dim() == 2:
            dimension = int(name.endswith(".b"))
            part = tensor.narrow(dimension, 0, tensor.shape[dimension] // 2)
        found[name] = torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part)
        del tensor, part
    for name, tensor in tensors.items():
        half = tensor
        if tensor.dim() == 2:
            half = tensor[:, :128] if name.endswith(".b") else tensor[:128]
        assert same_bits(found[name].cpu(), half.contiguous())
    assert load.counts.ahead + load.counts.asked == 9 * 4 + LAYERS * 3 * 8 + (2 * LAYERS + 1) * HALF
