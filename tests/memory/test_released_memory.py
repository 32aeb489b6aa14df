"""Memory that is kept for later loads: given back when asked for, and never kept where others would lack it."""

from __future__ import annotations

import gc
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import run_script, write_tensors

import weightload

pytestmark = pytest.mark.alone

MIB = 1 << 20
COUNT, EACH = 8, 16 * MIB
SIZE = COUNT * EACH


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [(f"t{i}", "F32", [EACH // 4]) for i in range(COUNT)]
    return write_tensors(tmp_path_factory.mktemp("kept") / "x.safetensors", tensors)


def _resident() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def _load_and_drop(path: Path) -> None:
    weightload.load_file(path, backend="pread")
    gc.collect()


def test_what_is_kept_goes_back_when_asked_for(path: Path) -> None:
    weightload.release_memory()
    before = _resident()
    _load_and_drop(path)
    assert _resident() - before > SIZE // 2  # kept
    assert SIZE <= weightload.release_memory() <= 2 * SIZE
    assert _resident() - before < SIZE // 4
    assert weightload.release_memory() == 0


def test_tensors_keep_theirs(path: Path) -> None:
    weightload.release_memory()
    tensors = weightload.load_file(path, backend="pread")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    weightload.release_memory()
    _load_and_drop(path)  # into memory of its own
    assert all(
        torch.equal(copies[name].view(torch.int32), tensor.view(torch.int32)) for name, tensor in tensors.items()
    )


def test_any_thread_may_ask_while_loads_run(path: Path) -> None:
    expected = weightload.load_file(path)
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.001):
            weightload.release_memory()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            loaded = weightload.load_file(path, backend="pread")
            assert all(
                torch.equal(loaded[name].view(torch.int32), expected[name].view(torch.int32)) for name in expected
            )
            del loaded
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_forked_child_has_nothing_to_give(path: Path) -> None:
    _load_and_drop(path)
    child = os.fork()
    if child == 0:
        os._exit(0 if weightload.release_memory() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert weightload.release_memory() > 0


def test_at_exit_it_is_harmless(path: Path) -> None:
    done = run_script(
        """
        import atexit, sys, weightload
        atexit.register(weightload.release_memory)
        tensors = weightload.load_file(sys.argv[1], backend="pread")
        class AtTheVeryEnd:
            def __del__(self, release=weightload.release_memory):
                release()
        keep = AtTheVeryEnd()
        """,
        path,
    )
    assert (done.returncode, done.stderr) == (0, "")


LIMITED = """
import resource, sys, torch, weightload
path, limit, when = sys.argv[1:]
def set_limit():
    size = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(getattr(resource, limit), (size + (8 << 30), resource.RLIM_INFINITY))
if when == "before": set_limit()
weights = weightload.safetensors_weights_iterator(path, to_cpu=True, backend="pread", show_progress=False)
if when == "during": set_limit()
tensors = dict(weights)
if when == "after": set_limit()
del tensors, weights
kept = weightload.release_memory()
assert kept == 0, kept
"""


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_nothing_is_kept_under_a_limit(limit: str, when: str, path: Path) -> None:
    done = run_script(LIMITED, path, limit, when)
    assert done.returncode == 0, done.stderr


def test_the_same_is_kept_without_one(path: Path) -> None:
    done = run_script(LIMITED, path, "RLIMIT_NOFILE", "never")
    assert "AssertionError" in done.stderr
