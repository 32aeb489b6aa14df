"""FastVideo's iterator in the modules that bind it: one rank, and two in FastVideo's own node group over gloo."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from engine_support import needs, run_ranks, some_tensors, write_shards

from weightload.integrations import fastvideo


@needs("fastvideo")
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_weights_are_the_engines(tmp_path: Path, ranks: int) -> None:
    """Four ways to call it at three sites. A corrupt file is an error on every rank."""
    files = write_shards(tmp_path, some_tensors(), 3)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(files[0].read_bytes()[:-9])
    said = run_ranks("fastvideo_ranks.py", ranks, json.dumps([str(file) for file in files]), torn)
    for rank in said:
        assert rank["before"] == 0
        assert rank["same"] == [True] * 12
        assert rank["error"].startswith("MetadataIncompleteBuffer")
        call = {"files": 3, "device": "cpu", "duplicates": "last"}
        alone = {**call, "ranks": 0, "strategy": "independent"}
        shared = {**call, "ranks": 2, "strategy": "auto"} if ranks == 2 else alone
        assert rank["calls"][:-1] == [shared, alone, alone, shared] * 3


def test_a_version_with_other_defaults_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastVideo 0.1 loaded to the CPU unless it was told otherwise, and its callers rely on that."""

    def iterator(hf_weights_files: list[str], to_cpu: bool = True) -> Any:
        raise AssertionError("not to be called")

    module = types.SimpleNamespace(safetensors_weights_iterator=iterator)
    monkeypatch.setitem(sys.modules, fastvideo.SITES[0][0], module)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not know this version of FastVideo"):
        fastvideo.FRAMEWORK.pairs()
