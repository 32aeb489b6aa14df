"""The order of a file's tensors, as engines rely on it."""

from __future__ import annotations

from pathlib import Path

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
