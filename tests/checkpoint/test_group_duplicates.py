"""Tensors that several files have, in shared loads: the same choice on every rank, or an error on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import scenarios
from support.ranks.groups import TUNED, assert_same_failure, assert_whole, drained, world
from test_duplicates import write, write_index

import weightload

# "auto" is independent on the CPU: the ranks of a given group agree, and each reads for itself.
pytestmark = pytest.mark.parametrize("strategy", ["auto", "broadcast", "striped"])


def pair(folder: Path) -> list[Path]:
    return [write(folder, "1", a=1, b=2, x=3), write(folder, "2", b=-2, x=-3, c=4)]


def run(strategy: str, files: list[Path], **arguments: Any) -> list[scenarios.Outcome]:
    return world(2).run(scenarios.load, files=files, strategy=strategy, tuned=TUNED, ranks=(0, 1), **arguments)


def load_mapping(here: scenarios.Rank, files: list[Path], strategy: str, **options: Any) -> dict[str, float]:
    """load_into for a mapping of what the files have; the first element of every tensor."""
    target = {name: torch.zeros(3) for file in files for name in weightload.load_file(file)}
    weightload.load_into(target, files, group=here.group((0, 1)), strategy=strategy, **options)
    return {name: tensor[0].item() for name, tensor in target.items()}


def test_the_last(tmp_path: Path, strategy: str) -> None:
    files = pair(tmp_path)
    assert_whole(run(strategy, files, duplicates="last"), ["a", "b", "c", "x"])
    outcomes = world(2).run(load_mapping, files=files, strategy=strategy, duplicates="last")
    assert [outcome.value for outcome in outcomes] == [{"a": 1, "b": -2, "c": 4, "x": -3}] * 2


def test_an_index_decides(tmp_path: Path, strategy: str) -> None:
    files = pair(tmp_path)
    write_index(tmp_path, a="1", b="1", x="1", c="2")
    assert_whole(run(strategy, files, reference=files[::-1]), ["a", "b", "x", "c"])
    outcomes = world(2).run(load_mapping, files=files, strategy=strategy)
    assert [outcome.value for outcome in outcomes] == [{"a": 1, "b": 2, "c": 4, "x": 3}] * 2


@pytest.mark.parametrize("given", ["error", "first"])
def test_one_rank_refuses(tmp_path: Path, strategy: str, given: str) -> None:
    files = pair(tmp_path)
    outcomes = run(strategy, files, duplicates="last", per_rank={1: {"duplicates": given}})
    failure = assert_same_failure(outcomes, {"error": "DuplicateTensor", "first": "ValueError"}[given], 1)
    assert ("`b`" in failure.message) is (given == "error")
    assert drained(outcomes)[0].names == []


def test_ranks_that_would_choose_differently(tmp_path: Path, strategy: str) -> None:
    """Ranks that take equally many tensors from other files disagree: they compare where each tensor comes from."""
    both = [pair(tmp_path / str(rank)) for rank in range(2)]
    write_index(tmp_path / "0", a="1", b="1", x="2", c="2")
    write_index(tmp_path / "1", a="1", b="2", x="1", c="2")
    outcomes = run(strategy, both[0], per_rank={1: {"files": both[1]}})
    failure = assert_same_failure(outcomes, "RankDisagreementError", None)
    assert "differs in selection" in failure.message
