"""The order of a file's tensors, as engines rely on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightload
from weightload.integrations.in_name_order import in_name_order


def test_a_weight_and_its_scale_come_together(tmp_path: Path) -> None:
    """Dtypes apart in the file; of a name in both files the last one counts."""
    files = [str(tmp_path / name) for name in ("1.safetensors", "2.safetensors")]
    for number, file in enumerate(files):
        save_file({f"{number}.a.scale": torch.ones(1), f"{number}.a.w": torch.ones(2).bfloat16(),
                   f"{number}.b.scale": torch.ones(1), "both": torch.full((2,), number).half()}, file)  # fmt: skip
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, duplicates="last")
    found = list(in_name_order(weights, files))
    assert [name for name, _ in found] == [
        "0.a.scale", "0.a.w", "0.b.scale", "1.a.scale", "1.a.w", "1.b.scale", "both",
    ]  # fmt: skip
    assert found[-1][1].tolist() == [1, 1]


def test_what_lies_by_name_is_not_held(tmp_path: Path) -> None:
    """An engine copies a tensor while the next ones are read, and memory of an accelerator is not a whole file's."""
    file = str(tmp_path / "1.safetensors")
    save_file({f"layers.{i}": torch.full((3,), i) for i in range(5)}, file)
    taken: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weightload.safetensors_weights_iterator([file], to_cpu=True):
            taken.append(name)
            yield name, tensor

    for number, (name, tensor) in enumerate(in_name_order(weights(), [file])):
        assert tensor.tolist() == [number] * 3
        assert taken[-1] == name
    assert len(taken) == 5


def test_some_names_only(tmp_path: Path) -> None:
    file = str(tmp_path / "1.safetensors")
    save_file({"b": torch.ones(1), "a": torch.ones(2), "c": torch.ones(1).half(), "d": torch.ones(1).double()}, file)
    names = {"a", "c", "d"}
    weights = weightload.safetensors_weights_iterator([file], to_cpu=True, names=names)
    assert [name for name, _ in in_name_order(weights, [file], names)] == ["a", "c", "d"]


def test_how_the_load_ends_is_passed_on(tmp_path: Path) -> None:
    file = str(tmp_path / "1.safetensors")
    save_file({"a": torch.ones(1)}, file)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(1)
        raise ValueError("at its end")

    found = in_name_order(weights(), [file])
    assert next(found)[0] == "a"
    with pytest.raises(ValueError, match="at its end"):
        next(found)
