"""SGLang's iterators with ``WEIGHTLOAD_SGLANG=1``, by its own plugin loader and its own model loader's files."""

from __future__ import annotations

import json
import logging
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import evict, on_a_local_disk, run_script
from engine_support import STAND_INS, needs, some_tensors, write_shards

from weightload.integrations import sglang as plugin

pytestmark = needs("sglang")

# Both iterators by SGLang, then by its plugins, among whose entry points weightload's is: what was called, and whether
# the tensors are the same. The names are those that the engine's loader has bound.
SCRIPT = """
import json, logging, os, sys
sys.path.insert(0, sys.argv[1])
import torchvision_operators
import torch
import weightload
from weightload import _C

calls = []
original = weightload.safetensors_weights_iterator

def counted(files, **named):
    calls.append({"files": len(files), **named})
    return original(files, **named)

weightload.safetensors_weights_iterator = counted
from sglang.srt.model_loader import loader, weight_utils
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from weightload.integrations.sglang import register

files, wanted = json.loads(sys.argv[2]), json.loads(sys.argv[3])
more = {"buffered_multi_thread_safetensors_weights_iterator": {"max_workers": 2}}
names = ["safetensors_weights_iterator", *more]

def load(module, name):
    return dict(getattr(module, name)(files, **more.get(name, {}), **wanted))

own = {name: load(loader, name) for name in names}
assert calls == []
load_plugins()
load_plugins()
register()
hooks = {target: len(hooks) for target, hooks in HookRegistry._hooks.items() if hooks}
assert all(getattr(loader, name) is getattr(weight_utils, name) for name in names)
same = []
for name in names:
    ours = load(loader, name)
    same += [len(ours) == len(own[name]) and all(
        ours[key].dtype == value.dtype and ours[key].shape == value.shape
        and torch.equal(ours[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        for key, value in own[name].items()
    )]
del own, ours
cached = sum(_C.resident_bytes(os.fsencode(file)) for file in files)
print()
print(json.dumps({"calls": calls, "same": same, "cached": cached, "hooks": hooks}))
"""


def load(files: list[Path], **wanted: Any) -> dict[str, Any]:
    done = run_script(SCRIPT, STAND_INS, json.dumps([str(file) for file in files]), json.dumps(wanted))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path, some_tensors(), 3)


CALL = {"to_cpu": True, "duplicates": "last", "backend": "mmap"}


def test_both_iterators_are_read_by_weightload(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    said = load(files, prefetch=True)
    assert said["same"] == [True, True]
    assert said["calls"] == [{"files": 3, **CALL}] * 2
    assert said["hooks"] == {f"{plugin.MODULE}.{name}": 1 for name in plugin.ITERATORS}


def test_nothing_changes_unless_it_is_asked_for(files: list[Path]) -> None:
    said = load(files)
    assert said["same"] == [True, True]
    assert said["calls"] == []
    assert said["hooks"] == {}


def test_without_mapping_and_without_leaving_files_in_the_cache(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    evict(files)  # written back, so that they can be dropped again
    said = load(files, disable_mmap=True, drop_cache_after_load=True)
    assert said["same"] == [True, True]
    assert said["calls"] == [{"files": 1, **CALL, "backend": "pread"}] * 6
    if on_a_local_disk(files[0].parent):
        assert said["cached"] == 0


def test_an_argument_that_is_not_known_is_left_to_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    def iterator(hf_weights_files: list[str], new: str | None = None) -> Any:
        return iter([("of the engine", new)])

    with caplog.at_level(logging.WARNING):
        assert list(plugin.read_instead(iterator, [], new="value")) == [("of the engine", "value")]
    assert "leaves this load to SGLang: it does not know new" in caplog.text
    assert list(plugin.read_instead(iterator, [], new=None)) == []


def test_a_corrupt_shard(files: list[Path]) -> None:
    import weightload

    def iterator(hf_weights_files: list[str]) -> Any:
        raise AssertionError("not to be called")

    files[1].write_bytes(files[1].read_bytes()[:-3])
    with pytest.raises(weightload.HeaderError, match=files[1].name):
        list(plugin.read_instead(iterator, [str(file) for file in files]))


def test_a_version_that_does_not_fit_is_refused() -> None:
    moved = types.SimpleNamespace(safetensors_weights_iterator=lambda hf_weights_files: None)
    with pytest.raises(RuntimeError, match="has no buffered_multi_thread_safetensors_weights_iterator"):
        plugin.require_known(moved)
