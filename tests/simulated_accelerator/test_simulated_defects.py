"""The list of defects that the simulated accelerator must catch stays true; `make defects` applies them."""

from __future__ import annotations

import re

import pytest
from conftest import TESTS

from simulated_accelerator.defects import DEFECTS, ROOT, Defect

README = (TESTS / "simulated_accelerator" / "README.md").read_text()
ON_CUDA = (TESTS / "simulated_cuda" / "README.md").read_text()


def test_there_are_enough() -> None:
    assert len({defect.name for defect in DEFECTS}) >= 8


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_every_defect_still_applies(defect: Defect) -> None:
    """Its line is in its file once, its tests exist, and both READMEs list it."""
    assert (ROOT / defect.file).read_text().count(defect.right) == 1
    for test in defect.tests:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    assert f"| {defect.name} |" in README
    assert f"| {defect.name} |" in ON_CUDA
