"""load_into in a group of ranks: modules that load themselves, and targets that one rank cannot fill."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.ranks import scenarios
from support.ranks.groups import STRATEGIES, world
from support.zoo.models import ZOO

ANIMALS = {
    "batch_norm": [],
    "weight_norm": [],
    "wrapped_for_checkpointing": [],
    "wrapped_with_a_hook": ["1.0"],
    "spectral_norm_of_old": ["1.0"],
    "override_of_the_root": [""],
    "hook_before": ["1.0"],
    "hook_after": [],
    "extra_state": ["1.0"],
    "tied_over_an_override": ["1.0"],
    "whole_override": [""],
}


def saved(name: str, folder: Path) -> list[Path]:
    """The state of one of the zoo's, in two files."""
    state = {key: torch.rand(t.shape).to(t.dtype) + 1 for key, t in ZOO[name]().state_dict().items()}
    paths = [folder / "1.safetensors", folder / "2.safetensors"]
    for number, path in enumerate(paths):
        safetensors.torch.save_file(dict(list(state.items())[number::2]), path)
    return paths


@pytest.mark.parametrize("strategy", [*STRATEGIES, "independent"])
@pytest.mark.parametrize("name", ANIMALS)
def test_modules_that_take_part_get_it_on_every_rank(name: str, strategy: str, tmp_path: Path) -> None:
    files = saved(name, tmp_path)
    for outcome in world(2).run(scenarios.load_animal, files=files, strategy=strategy, name=name):
        assert outcome.value["failure"] is None
        assert outcome.value["same"]
        assert outcome.value["took part"] == ANIMALS[name]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["batch_norm", "weight_norm", "override_of_the_root"])
def test_what_one_rank_cannot_fill_no_rank_changes(name: str, strategy: str, tmp_path: Path) -> None:
    files = saved(name, tmp_path)
    outcomes = world(2).run(
        scenarios.load_animal, files=files, strategy=strategy, name=name, per_rank={1: {"stubborn": True}}
    )
    for outcome in outcomes:
        failure = outcome.value["failure"]
        assert "StateDictError" in failure.kinds
        assert failure.message.startswith("on rank 1: ")
        assert "'stubborn' has no memory" in failure.message
        assert not outcome.value["changed"]
