"""accelerate: checkpoints into models without memory, weights left on disk, states of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counting import Counted, counted_loads, require  # noqa: F401
from safetensors.torch import save_file

require("accelerate")

from accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch  # noqa: E402


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(model().state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("places", [{"": "cpu"}, {"0": "cpu", "1": "disk", "2": "cpu", "3": "disk"}])
def test_into_a_model_without_memory(
    checkpoint: Path, counted: Counted, places: dict[str, str], tmp_path: Path
) -> None:
    calls = counted("accelerate")
    with init_empty_weights():
        empty = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    given = torch.arange(64.0)
    loaded = load_checkpoint_and_dispatch(
        empty, str(checkpoint), device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(loaded(given), model()(given))
    assert sum(calls.values()) >= 2


def test_offloaded_safetensors_are_read_by_name(checkpoint: Path, counted: Counted, tmp_path: Path) -> None:
    from accelerate.utils import OffloadedWeightsLoader

    calls = counted("accelerate")
    names = model().state_dict()
    index = {name: {"safetensors_file": str(checkpoint), "weight_name": name} for name in names}
    loader = OffloadedWeightsLoader(index=index, save_folder=tmp_path)
    assert all(torch.equal(loader[name], tensor) for name, tensor in names.items())
    assert calls["safe_open"] == len(names)


def test_a_state_of_training(counted: Counted, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model())
    accelerator.save_state(str(tmp_path / "state"))
    expected = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    for parameter in prepared.parameters():
        parameter.data.zero_()
    calls = counted("accelerate")
    accelerator.load_state(str(tmp_path / "state"))
    assert calls["load_model"] == 1
    assert all(torch.equal(prepared.state_dict()[name], tensor) for name, tensor in expected.items())
