"""Files that the process neither owns nor may write, of which the kernel does not say what is in the page cache.

A model cache that root filled, and a service user's process. Warm, they are read once; cold, as any.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, on_a_local_disk, run_script, write_tensors

pytestmark = pytest.mark.alone

MIB = 1 << 20
TASK = MIB
SIZES = {"large": 8 * MIB + 4096, "middle": MIB, "last": 100_000}  # bytes

# Everything is imported while that may be read; then the process becomes another user's. A program that such a user
# starts is dumpable, so that it may look at its own page tables.
SCRIPT = """
import ctypes, json, os, sys, time
sys.path.insert(0, sys.argv[1])
import weightload
from conftest import evict
from support.ways import CPU_WAYS, content, halves
from pathlib import Path
from weightload import _C, errors, safe_open
from weightload._checkpoint import selection

path, small = Path(sys.argv[2]) / "x.safetensors", Path(sys.argv[2]) / "small.safetensors"
CPU_WAYS["load_into"]([path])  # imports the rest
wanted = content(path)
ways = {**CPU_WAYS, "slices-mmap": lambda paths: halves(paths, backend="mmap")}
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
found = {}

def calls(way):
    _C.arm_fault("delay", first=1 << 60)  # counts reads, and hits none
    way()
    _C.disarm_fault()
    return _C.reads_since_armed()

def fails(way):
    # After the header, for ever.
    _C.arm_fault("error", first=1, count=10**6, error_number=5)
    try:
        way()
        return False
    except errors.ReadError as error:
        return error.errno == 5 and error.tensor is not None
    finally:
        _C.disarm_fault()

def one(get):
    with safe_open(path) as handle:
        _C.arm_fault("error", count=10**6, error_number=5)
        get(handle)

def each(get, backend):
    with safe_open(path, backend=backend) as handle:
        for name in handle.offset_keys():
            get(handle, name)

found["told"] = _C.resident_bytes(os.fsencode(path))
once = {
    "iterator": lambda backend: list(weightload.safetensors_weights_iterator(path, to_cpu=True, backend=backend)),
    "load_file": lambda backend: weightload.load_file(path, backend=backend),
    "get_tensor": lambda backend: each(lambda handle, name: handle.get_tensor(name), backend),
    "get_slice": lambda backend: each(lambda handle, name: handle.get_slice(name)[:], backend),
}
# The least of three: the system may take a page back, and have it read again, at any time.
def least(count):
    return min(count() for _ in range(3))

found["reads"] = {
    f"{n} {b}": least(lambda: calls(lambda: way(b))) for n, way in once.items() for b in ("mmap", "pread")
}
found["small reads"] = [
    least(lambda: calls(lambda: CPU_WAYS[way]([small]))) for way in ("iterator-mmap", "load_file-mmap")
]
def threads(path):
    with weightload.safetensors_weights_iterator(path, to_cpu=True) as weights:
        list(weights)
        return weights.stats().threads

found["small threads"] = least(lambda: threads(small))
(few,) = selection.open_files([small])
reader = _C.TensorReader(few)
found["small at hand"] = [reader.is_at_hand(0, few.size), reader.is_at_hand(*few.tensors()[1][3:])]
handles = {
    "get_tensor": lambda: one(lambda handle: handle.get_tensor("large")),
    "get_slice": lambda: one(lambda handle: handle.get_slice("large")[1:]),
}
for state in ("warm", "cold"):
    def there():
        path.read_bytes() if state == "warm" else evict([path])
    wrong, unnoticed = [], []
    for name, way in ways.items():
        there()
        if way([path]) != wanted:
            wrong.append(name)
        there()
        if name not in ("safe_open-mmap", "slices-mmap") and not fails(lambda: way([path])):
            unnoticed.append(name)
    for name, way in handles.items():
        there()
        if not fails(way):
            unnoticed.append(name)
    found[state] = {"wrong": wrong, "unnoticed": unnoticed}

(opened,) = selection.open_files([path])
(begin, end) = opened.tensors()[0][3:]
evict([path])
found["cold is cold"] = []
for _ in range(12):
    found["cold is cold"].append(_C.TensorReader(opened).is_at_hand(begin, end))
    time.sleep(0.01)  # what the kernel may have begun to read comes meanwhile
path.read_bytes()
found["warm is warm"] = [_C.TensorReader(opened).is_at_hand(begin, end) for _ in range(3)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["disk", "memory", "overlay"])
def found(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Return what the user ``nobody`` sees of root's file on a disk, in memory or on an overlay."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if request.param == "memory" else None) as name:
        folder = Path(name)
        folder.chmod(0o755)
        if request.param == "overlay":
            with _overlaid(folder) as merged:
                yield _look(merged) | {"tells": on_a_local_disk(folder)}
            return
        _write(folder)
        answer = _look(folder)
        yield answer | {"tells": request.param == "disk" and on_a_local_disk(folder)}


@contextlib.contextmanager
def _overlaid(folder: Path) -> Iterator[Path]:
    lower, other, merged = (folder / layer for layer in ("lower", "other", "merged"))
    for layer in (lower, other, merged):
        layer.mkdir()
    _write(lower)
    mount = ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={other}:{lower}", str(merged)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("overlayfs cannot be mounted here")
    try:
        yield merged
    finally:
        subprocess.run(["umount", "--lazy", str(merged)], check=True)


def _write(folder: Path) -> None:
    large = write_tensors(folder / "x.safetensors", [(name, "U8", [size]) for name, size in SIZES.items()])
    small = write_tensors(folder / "small.safetensors", [("a", "U8", [200_000]), ("b", "U8", [50_000])])
    for path in (large, small):
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file)  # what is dirty cannot be evicted


def _look(folder: Path) -> dict[str, Any]:
    for path in folder.iterdir():
        path.read_bytes()
    environment = {**os.environ, "WEIGHTLOAD_TASK_BYTES": str(TASK), "WEIGHTLOAD_THREADS": "2"}
    done = run_script(SCRIPT, TESTS, folder, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_nobody_says_what_is_not_known(found: dict[str, Any]) -> None:
    assert found["told"] is None


def test_warm_files_are_read_once(found: dict[str, Any]) -> None:
    # The header, and one populating, or one read, of each task of each tensor (which may begin within one). Reading a
    # task once more, as when it is taken for cold, is four reads: that happens where two threads meet at one page.
    most = 1 + sum(size // TASK + 2 for size in SIZES.values()) + 3 * 4
    assert {name: calls for name, calls in found["reads"].items() if calls > most} == {}
    assert found["small threads"] == 0, "one start of a thread is dearer than all the rest"
    assert found["small at hand"] == [True, True]
    assert max(found["small reads"]) <= 2 + 1, "the header, and one populating; or one more read"


@pytest.mark.parametrize("state", ["warm", "cold"])
def test_every_way_has_the_same_bytes(found: dict[str, Any], state: str) -> None:
    assert found[state]["wrong"] == []


@pytest.mark.parametrize("state", ["warm", "cold"])
def test_a_bad_sector_is_an_error(found: dict[str, Any], state: str) -> None:
    """Also where the file seems to be in the page cache, and is not."""
    assert found[state]["unnoticed"] == []


def test_asking_does_not_change_the_answer(found: dict[str, Any]) -> None:
    """Some kernels begin to read what a read that must not wait has asked for; a page that is mapped is read."""
    if not found["tells"]:
        pytest.skip("what is in memory is never cold")
    assert found["cold is cold"] == [False] * 12
    assert found["warm is warm"] == [True] * 3
