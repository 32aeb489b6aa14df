"""No call waits for a file's server with Python's lock held: other threads go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_script, write_tensors
from support import fuse_server

pytestmark = pytest.mark.skipif(fuse_server.why_not() is not None, reason=str(fuse_server.why_not()))

MIB = 1 << 20

# The server answers each question for attributes when another Python thread has seen that it came, and lets go of it.
# If the thread that asks keeps the lock both wait, until the server gives up.
SCRIPT = """
import json, os, sys, threading, time
import weightload
from weightload import safe_open

path, holds, way = sys.argv[1:]
met = holds + ".met"

def iterate():
    with weightload.safetensors_weights_iterator(path, to_cpu=True, backend="mmap") as weights:
        next(weights)
        yield
        yield len(list(weights)) + 1

def handle(get):
    with safe_open(path) as file:
        names = file.offset_keys()
        get(file, names[0])
        yield
        yield 1 + sum(1 for name in names[1:] if get(file, name) is not None)

def again():
    with safe_open(path) as file:
        first = file.get_tensor("large")
        yield
        yield len({file.get_tensor("large").data_ptr(), first.data_ptr()}) + 1

ways = {
    "iterator": iterate,
    "get_tensor": lambda: handle(lambda file, name: file.get_tensor(name)),
    "get_slice": lambda: handle(lambda file, name: file.get_slice(name)[1:]),
    "the same again": again,
}

met_times = 0

def let_go():
    global met_times
    while True:
        if os.path.exists(met):
            met_times += 1
            os.unlink(met)
        time.sleep(0.002)

steps = ways[way]()
next(steps)
open(holds, "wb").close()
threading.Thread(target=let_go, daemon=True).start()
count = next(steps)
os.unlink(holds)
print(json.dumps([count, met_times > 0, os.path.exists(holds + ".late")]))
"""


@pytest.mark.parametrize("way", ["iterator", "get_tensor", "get_slice", "the same again"])
def test_other_threads_go_on(way: str, tmp_path: Path) -> None:
    folder, holds = tmp_path / "served", tmp_path / "holds"
    folder.mkdir()
    write_tensors(
        folder / "x.safetensors", [("small", "U8", [4096]), ("large", "U8", [2, MIB]), ("last", "U8", [9, 9])]
    )
    with fuse_server.mounted(folder, tmp_path / "mount", holds=str(holds), threads=3) as mount:
        done = run_script(SCRIPT, mount / "x.safetensors", holds, way, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    tensors, asked, late = json.loads(done.stdout)
    assert (tensors, asked) == (3, True), "all tensors came, and the server was asked"
    assert not late, "no other thread ran while it was"
