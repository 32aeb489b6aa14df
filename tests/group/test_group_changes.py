"""A file that is overwritten while several ranks share its reading: no rank gets new bytes, all hear of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.ranks import scenarios
from support.ranks.groups import TUNED, assert_same_failure, drained, world


@pytest.mark.parametrize("strategy", ["broadcast", "striped"])
def test_a_file_overwritten_mid_load(checkpoint: list[Path], tmp_path: Path, strategy: str) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in checkpoint]
    for path in files:
        os.utime(path, (1_600_000_000, 1_600_000_000))
    three = world(3)
    # The scenario compares every tensor that it gets with the reference's.
    three.start(scenarios.load, files=files, reference=checkpoint, strategy=strategy, tuned=TUNED, pause=["5"])
    for rank in range(3):
        three.wait_until(rank, "5")
    with files[1].open("r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(bytes(255 - byte for byte in data))
    three.go_on(0, 1, 2)
    outcomes = [three.outcome(rank) for rank in range(3)]
    results = drained(outcomes)
    assert results[0].error is not None
    failure = assert_same_failure(outcomes, "ReadError", results[0].error.rank)
    assert "changed while it was read" in failure.message
    assert failure.filename == str(files[1])
    assert failure.errno is None
    assert failure.tensor is not None
    assert failure.tensor.startswith("1.")
    assert failure.tensor not in results[0].names
