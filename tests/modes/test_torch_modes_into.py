"""torch's modes and targets of load_into and load_model that are not ordinary; see test_torch_modes.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import write_tensors
from support.torch_modes import MODES, look_around, undisturbed
from test_torch_modes import Model, facts
from torch._subclasses.fake_tensor import FakeTensorMode

import weightload
from weightload._into import places
from weightload.errors import StateDictError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [("matrix", "F32", [6, 5]), ("half", "BF16", [40, 3]), ("one", "F32", [1]), ("rows", "I64", [3000, 9])]
    return write_tensors(tmp_path_factory.mktemp("modes") / "small.safetensors", tensors)


class Participant(Model):
    """A module whose hooks take part in the loading: the user's code."""

    def __init__(self) -> None:
        super().__init__()
        self.around: list[Any] = []
        self.register_load_state_dict_pre_hook(lambda *_: self.around.append(look_around()))


# load_state_dict itself ends the process in a trace (torch 2.13).
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "jit.trace"])
@pytest.mark.parametrize("load", [weightload.load_model, weightload.load_into])
def test_what_takes_part_in_its_loading_is_in_the_users_modes(path: Path, load: Callable[..., Any], mode: str) -> None:
    """It is torch's load_state_dict, with the tensors that there are without the mode."""
    tensors = weightload.load_file(path)
    ours, theirs = Participant(), Participant()

    def outcome(call: Callable[[], Any], model: Participant) -> Any:
        here = look_around()
        try:
            call()
        except Exception as error:
            return RuntimeError if isinstance(error, StateDictError) else type(error)
        finally:
            assert all(one == here for one in model.around)
        return "loaded"

    def load_as_torch() -> None:
        if load is weightload.load_model:
            theirs.state_dict()  # which safetensors' load_model begins with
        theirs.load_state_dict(tensors, strict=False)

    ended = MODES[mode](lambda: outcome(lambda: load(ours, path, strict=False), ours))
    assert ended == MODES[mode](lambda: outcome(load_as_torch, theirs))
    assert len(ours.around) == len(theirs.around)
    assert facts(dict(ours.state_dict())) == facts(dict(theirs.state_dict()))


def test_inference_tensors_are_filled_in_inference_mode(path: Path) -> None:
    reference = safetensors.torch.load_file(path)
    with torch.inference_mode():
        target = {"matrix": torch.zeros(6, 5), "rows": torch.zeros(3000, 9, dtype=torch.float64), "normal": None}
        target["normal"] = NORMAL
        weightload.load_into(target, path, strict=False)
        assert torch.equal(target["matrix"].view(torch.uint8), reference["matrix"].view(torch.uint8))
        assert torch.equal(target["rows"], reference["rows"].double())


NORMAL = torch.zeros(2)


@pytest.mark.parametrize("mode", MODES)
def test_inference_tensors_are_filled_in_every_mode(path: Path, mode: str) -> None:
    """Those that are read into, cast, not contiguous, and one over the other."""
    reference = safetensors.torch.load_file(path)
    with torch.inference_mode():
        memory = torch.zeros(60)
        target = {
            "matrix": torch.zeros(6, 5),
            "rows": torch.zeros(3000, 9, dtype=torch.float64),
            "half": torch.zeros(3, 40, dtype=torch.bfloat16).t(),
        }
        over = {"matrix": memory[:30].view(6, 5), "one": memory[29:30]}
        model = torch.nn.Module()
        model.matrix = torch.nn.Parameter(torch.zeros(6, 5), requires_grad=False)
        model.one = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        model.register_load_state_dict_post_hook(lambda *_: None)

    def load() -> None:
        for into in (target, over, model):
            weightload.load_into(into, path, strict=False)

    MODES[mode](lambda: undisturbed(load))
    for name, tensor in [*target.items(), *model.named_parameters()]:
        assert same_bytes(tensor, reference[name].to(tensor.dtype)), name
    mixed = reference["matrix"].clone()
    mixed.view(-1)[-1] = reference["one"][0]
    assert same_bytes(over["matrix"], mixed)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_version_counters_of_parameters_move_in_inference_mode(path: Path) -> None:
    direct, cast = torch.nn.Parameter(torch.zeros(6, 5)), torch.nn.Parameter(torch.zeros(40, 3))
    losses = [(direct**2).sum(), (cast**2).sum()]
    with torch.inference_mode():
        weightload.load_into({"matrix": direct, "half": cast}, path, strict=False)
    assert (direct._version, cast._version) == (1, 1)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_be_cast_is_refused_in_every_mode(path: Path, mode: str) -> None:
    """On the meta device, say, a trial would succeed."""
    target = {"matrix": torch.ones(6, 5, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "one": torch.ones(1)}

    def load() -> str:
        places._cast_problem.cache_clear()
        with pytest.raises(StateDictError) as caught:
            weightload.load_into(target, path, strict=False)
        return str(caught.value)

    assert MODES[mode](lambda: undisturbed(load)) == load()
    assert target["one"].tolist() == [1]


def test_a_fake_tensor_has_no_memory_to_load_into(path: Path) -> None:
    with FakeTensorMode():
        fake = {"matrix": torch.zeros(6, 5)}
        model = torch.nn.Linear(5, 6)
        with pytest.raises(StateDictError, match="no memory"):
            weightload.load_into(fake, path, strict=False)
        with pytest.raises(StateDictError, match="no memory"):
            weightload.load_into(model, path, strict=False)
        model.register_load_state_dict_pre_hook(lambda *_: None)
        with pytest.raises(StateDictError, match="no memory"):
            weightload.load_into(model, path, strict=False)
    with pytest.raises(StateDictError, match="no memory"):
        weightload.load_into(model, path, strict=False)
    with pytest.raises(StateDictError, match="no memory"):
        weightload.load_into(fake, path, strict=False)
