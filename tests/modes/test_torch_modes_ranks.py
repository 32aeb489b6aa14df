"""torch's modes, contexts and defaults change nothing in a load that ranks share; see test_torch_modes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tensors
from support.ranks import scenarios
from support.ranks.groups import STRATEGIES, TUNED, fresh_world, world
from support.ranks.simulated import Rank, Ranks
from support.simulated import DEVICE, reference_of
from support.simulated import TUNED as TUNED_SLOTS
from support.torch_modes import MODES, described, look_around, undisturbed

import weightload
from weightload import _C, settings


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [("large", "F32", [300, 700]), ("scalar", "F64", []), ("empty", "F32", [0]), ("bool", "BOOL", [70, 3])]
    tensors += [(f"{i}", "BF16", [i, 3]) for i in range(9)]
    return write_tensors(tmp_path_factory.mktemp("ranks") / "r.safetensors", tensors)


def iterate(path: Path, device: str, group: Any, strategy: str) -> dict[str, torch.Tensor]:
    here, got = look_around(), {}
    for name, tensor in weightload.safetensors_weights_iterator([path], device=device, group=group, strategy=strategy):
        assert look_around() == here
        got[name] = tensor
    return got


def fail(path: Path, device: str, group: Any, strategy: str) -> Any:
    _C.arm_fault("error", first=0, count=1 << 30, error_number=5)
    try:
        iterate(path, device, group, strategy)
    except OSError as error:
        return type(error).__name__, str(error)
    finally:
        _C.disarm_fault()
    return "no error"


class Into:
    def __init__(self, path: Path, device: str) -> None:
        self.target = {name: torch.zeros_like(tensor).to(device) for name, tensor in reference_of(path).items()}
        self.target["large"] = torch.nn.Parameter(torch.zeros(700, 300, dtype=torch.float64, device=device).t())

    def __call__(self, path: Path, device: str, group: Any, strategy: str) -> dict[str, torch.Tensor]:
        weightload.load_into(self.target, path, group=group, strategy=strategy)
        return self.target


CALLS: dict[str, Any] = {"iterator": lambda *_: iterate, "failure": lambda *_: fail, "load_into": Into}


def facts(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: described(tensor) for name, tensor in result.items()}
    return result


def in_every_mode(path: Path, device: str, group: Any, strategy: str) -> list[str]:
    """Make every call in every mode, and describe each outcome that differs from that without a mode."""
    wrong = []
    for name, make in CALLS.items():
        plain = facts(make(path, device)(path, device, group, strategy))
        for mode, run in MODES.items():
            call = make(path, device)
            try:
                got = facts(run(lambda: undisturbed(lambda: call(path, device, group, strategy))))  # noqa: B023
            except Exception as error:
                got = repr(error)
            if got != plain:
                wrong.append(f"{name}, {mode}: {got if isinstance(got, str) else 'other tensors'}")
    return wrong


def over_gloo(here: scenarios.Rank, path: Path, strategy: str) -> list[str]:
    with settings.override(**TUNED):
        return in_every_mode(path, "cpu", here.group([0, 1]), strategy)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "independent"])
def test_loads_shared_over_gloo(path: Path, strategy: str) -> None:
    outcomes = world(2).run(over_gloo, path=path, strategy=strategy)
    assert [outcome.value for outcome in outcomes] == [[], []]


def node_groups(here: scenarios.Rank, mode: str) -> str:
    """Asked for the first time within a mode, where no launcher says who is on a node: the ranks ask one another."""
    group = MODES[mode](lambda: undisturbed(weightload.node_group))
    return type(group).__name__


@pytest.mark.parametrize("mode", ["all at once", "FakeTensorMode", "dispatch mode that refuses", "jit.trace"])
def test_ranks_find_their_node(mode: str) -> None:
    with fresh_world(2, launched=False) as ours:
        assert [outcome.value for outcome in ours.run(node_groups, mode=mode)] == ["ProcessGroup"] * 2


def over_accelerators(rank: Rank, kind: str, path: Path, strategy: str) -> None:
    with settings.override(**TUNED_SLOTS), rank.group(kind) as group:
        wrong = in_every_mode(path, DEVICE, group, strategy)
    assert wrong == []


@pytest.mark.simulated
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loads_shared_by_accelerators(ranks: Ranks, path: Path, strategy: str) -> None:
    ranks.call(over_accelerators, "both", path, strategy)


@pytest.mark.simulated
def test_loads_shared_by_accelerators_alone(two: Ranks, path: Path) -> None:
    """Records travel through the accelerator, too."""
    two.call(over_accelerators, "device", path, "striped")
