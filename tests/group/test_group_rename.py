"""``rename=`` in groups of ranks: the same tensors on every rank, or an error on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.ranks import scenarios
from support.ranks.groups import TUNED, world
from support.ranks.scenarios import Failure

import weightload
from weightload import settings

pytestmark = pytest.mark.parametrize("strategy", ["auto", "broadcast", "striped"])

ROWS, WIDTH = 64, 300


def renamed(name: str) -> Any:
    """q and k one above the other, left and right side by side, experts on a stack; no rotary."""
    layer, _, part = name.rpartition(".")
    if part in ("q", "k"):
        return f"{layer}.qk", (slice(0, ROWS) if part == "q" else slice(ROWS, 2 * ROWS),)
    if part in ("left", "right"):
        return f"{layer}.both", (slice(None), slice(0, WIDTH) if part == "left" else slice(WIDTH, 2 * WIDTH))
    return None if part == "rotary" else f"{layer}.new" if part == "old" else (f"{layer}.experts", (int(part),))


def late(name: str) -> Any:
    """Answers until the last name but one."""
    if name == "3.rotary":
        raise ZeroDivisionError("of rename")
    return renamed(name)


def other(name: str) -> Any:
    return "3.newer" if name == "3.old" else renamed(name)


RENAMES: dict[str, Any] = {
    "right": renamed,
    "raises": late,
    "no mapping": 3,
    "no answer": lambda name: [renamed(name)],
    "a gap": lambda name: None if name == "2.q" else renamed(name),
    "one name": lambda name: "x",
    "another": other,
}


def checkpoint(folder: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(1)
    state = {
        f"{layer}.{part}": torch.rand(5, 7) if part in "012" else torch.rand(ROWS, WIDTH, generator=generator)
        for layer in range(4)
        for part in ("q", "k", "left", "right", "old", "rotary", "0", "1", "2")
    }
    paths = [folder / "0.safetensors", folder / "1.safetensors"]
    for number, path in enumerate(paths):
        safetensors.torch.save_file(dict(list(state.items())[number::2]), path)
    return paths


def expected(files: list[Path]) -> dict[str, torch.Tensor]:
    state = {name: tensor for path in files for name, tensor in safetensors.torch.load_file(path).items()}
    found = {}
    for layer in range(4):
        found[f"{layer}.qk"] = torch.cat([state[f"{layer}.q"], state[f"{layer}.k"]])
        found[f"{layer}.both"] = torch.cat([state[f"{layer}.left"], state[f"{layer}.right"]], 1)
        found[f"{layer}.experts"] = torch.stack([state[f"{layer}.{n}"] for n in range(3)])
        found[f"{layer}.new"] = state[f"{layer}.old"]
    return found


def load(here: scenarios.Rank, files: list[Path], strategy: str, kind: str, way: str) -> dict[str, Any]:
    """Load on one rank. Report whether the tensors are right, how it failed, and whether the target was touched."""
    whole = expected(files)
    target = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    group, failure = here.group((0, 1)), None
    with settings.override(**TUNED):
        try:
            if way == "into":
                weightload.load_into(target, files, rename=RENAMES[kind], group=group, strategy=strategy)
            else:
                target = dict(
                    weightload.safetensors_weights_iterator(
                        files, device="cpu", rename=RENAMES[kind], group=group, strategy=strategy
                    )
                )
        except Exception as error:
            failure = Failure.of(error)
    same = target.keys() == whole.keys() and all(torch.equal(target[name], whole[name]) for name in whole)
    return {"same": same, "failure": failure, "touched": any(bool(tensor.any()) for tensor in target.values())}


@pytest.mark.parametrize("way", ["into", "iterator"])
def test_every_rank_gets_whole_tensors(way: str, strategy: str, tmp_path: Path) -> None:
    outcomes = world(2).run(load, files=checkpoint(tmp_path), strategy=strategy, kind="right", way=way)
    assert [outcome.value["failure"] for outcome in outcomes] == [None, None]
    assert all(outcome.value["same"] for outcome in outcomes)


@pytest.mark.parametrize("way", ["into", "iterator"])
@pytest.mark.parametrize(
    ("kind", "expected_kind", "words"),
    [
        ("raises", "WeightLoadError", "of rename"),
        ("no mapping", "TypeError", "rename must be"),
        ("no answer", "TypeError", "rename"),
        ("a gap", "WeightLoadError", "nothing fills"),
        ("one name", "DuplicateTensor", "gives the name x"),
    ],
)
def test_what_one_rank_says_wrong_is_raised_on_all(
    kind: str, expected_kind: str, words: str, way: str, strategy: str, tmp_path: Path
) -> None:
    files = checkpoint(tmp_path)
    outcomes = world(2).run(load, files=files, strategy=strategy, way=way, kind="right", per_rank={1: {"kind": kind}})
    for outcome in outcomes:
        failure = outcome.value["failure"]
        assert failure is not None
        assert words in failure.message
        assert failure.rank == 1
        assert expected_kind in failure.kinds
        assert way == "iterator" or not outcome.value["touched"]


def test_ranks_that_rename_differently(strategy: str, tmp_path: Path) -> None:
    files = checkpoint(tmp_path)
    outcomes = world(2).run(
        load, files=files, strategy=strategy, way="iterator", kind="right", per_rank={1: {"kind": "another"}}
    )
    for outcome in outcomes:
        assert "RankDisagreementError" in outcome.value["failure"].kinds
