"""Storage of a few hundred kilobytes a second: Ctrl-C, close() and an error end a load soon, in every public call."""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, run_script, write_tensors
from support import fuse_server

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(fuse_server.why_not() is not None, reason=str(fuse_server.why_not())),
]

MIB = 1 << 20

# Seconds that a call may go on when it is interrupted. The contract is one; this machine may be busy.
SOON = 2.5

# How slow: by its bytes, or by its answers, one after the other. Fast as far as headers are read.
SPEEDS = {
    "600 kB/s": {"bytes_per_s": 600e3, "delay_from": 256 << 10},
    "200 kB/s": {"bytes_per_s": 200e3, "delay_from": 256 << 10},
    "0.2 s an answer": {"delay_s": 0.2, "delay_from": 256 << 10},
    "0.2 s an answer, past the page cache": {"delay_s": 0.2, "delay_from": 256 << 10, "direct_io": True},
    "0.4 s an answer, eight at once": {"delay_s": 0.4, "delay_from": 256 << 10, "threads": 8},
}

SCRIPT = """
    import json, os, signal, sys, threading, time
    sys.path.insert(0, os.environ["TESTS"])
    import torch, weightload
    from weightload import _C
    from conftest import interrupted_after

    path, header, after = sys.argv[1], sys.argv[2], float(sys.argv[3])
    target = {f"t{i}": torch.zeros(1 << 20, dtype=torch.uint8) for i in range(48)}

    def drain(**options):
        for _ in weightload.safetensors_weights_iterator([path], to_cpu=True, **options):
            pass

    def prefetch():
        with weightload.safe_open(path) as handle, handle.prefetch() as loader:
            for _ in loader:
                pass

    def single(backend):
        with weightload.safe_open(path, backend=backend) as handle:
            for name in handle.offset_keys():
                handle.get_tensor(name)

    def rows():
        with weightload.safe_open(path) as handle:
            for name in handle.offset_keys():
                handle.get_slice(name)[1000:]

    def alone(what):
        _C.refuse_threads(True)
        what()

    ways = {
        "iterator-mmap": lambda: drain(backend="mmap"),
        "iterator-pread": lambda: drain(backend="pread"),
        "load_file": lambda: weightload.load_file(path),
        "load_into": lambda: weightload.load_into(target, path),
        "prefetch": prefetch,
        "single-mmap": lambda: single("mmap"),
        "single-pread": lambda: single("pread"),
        "rows": rows,
        "a header": lambda: weightload.safe_open(header),
        "two headers": lambda: weightload.resolve_safetensors_files([header, header]),
        "no threads, mmap": lambda: alone(lambda: drain(backend="mmap")),
        "no threads, pread": lambda: alone(lambda: drain(backend="pread")),
    }
    chosen = sys.argv[4:] or list(ways)
    found = {}
    for name in chosen:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            said = "came to an end"
            begin = time.monotonic()
            try:
                with interrupted_after(after):
                    ways[name]()
            except KeyboardInterrupt:
                said = time.monotonic() - begin - after
            except BaseException as error:
                said = repr(error)
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as pipe: said = pipe.read()
        os.waitpid(child, 0)
        found[name] = json.loads(said)
    for backend in ("mmap", "pread"):
        with weightload.safetensors_weights_iterator([path], to_cpu=True, backend=backend) as weights:
            time.sleep(after)
            begin = time.monotonic()
        found[f"close, {backend}"] = time.monotonic() - begin
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow")
    write_tensors(folder / "m.safetensors", [(f"t{i}", "U8", [MIB]) for i in range(48)])
    text = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' + b" " * (6 * MIB) + b"}"
    (folder / "h.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def ended(mount: Path, after: float, *ways: str) -> dict[str, Any]:
    environment = {**os.environ, "TESTS": str(TESTS)}
    done = run_script(SCRIPT, mount / "m.safetensors", mount / "h.safetensors", after, *ways, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("speed", SPEEDS)
def test_an_interrupt_and_close_end_a_load_soon(speed: str, folder: Path, tmp_path: Path) -> None:
    few = () if speed == "600 kB/s" else ("iterator-mmap", "iterator-pread", "single-mmap", "a header")

    def found(after: float) -> dict[str, Any]:
        with fuse_server.mounted(folder, tmp_path / f"mount-{after}", **SPEEDS[speed]) as mount:
            return ended(mount, after, *few)

    with ThreadPoolExecutor() as both:  # at once, each on storage of its own: they wait nearly all the time
        for outcome in both.map(found, (0.5, 2.0) if few else (1.0,)):
            for way, said in outcome.items():
                assert isinstance(said, float), (way, said)
                assert said < SOON, (way, said)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_an_error_ends_a_load_soon(backend: str, folder: Path, tmp_path: Path) -> None:
    """An error in the first task ends the load soon, while other threads are at later tasks."""
    faults = {"bytes_per_s": 600e3, "delay_from": 8 * MIB, "error_from": 4 * MIB, "error_to": 5 * MIB}
    script = """
        import sys, time, weightload
        begin = time.monotonic()
        try:
            for _ in weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, backend=sys.argv[2]): pass
        except weightload.errors.ReadError as error:
            assert error.errno == 5, error
            print(time.monotonic() - begin)
    """
    with fuse_server.mounted(folder, tmp_path / "mount", **faults) as mount:
        done = run_script(script, mount / "m.safetensors", backend)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2 * SOON


@pytest.mark.parametrize("speed", ["600 kB/s", "0.4 s an answer, eight at once"])
def test_slow_storage_is_read_at_its_speed(speed: str, folder: Path, tmp_path: Path) -> None:
    """A load that can stop soon must still read at the speed of the storage."""
    script = """
        import sys, time, weightload
        begin = time.monotonic()
        for name, _ in weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, backend=sys.argv[2]):
            if name == "t5": break
        print(time.monotonic() - begin)
    """
    with fuse_server.mounted(folder, tmp_path / "mount", **SPEEDS[speed]) as mount:
        for backend in ("mmap", "pread"):
            done = run_script(script, mount / "m.safetensors", backend)
            assert done.returncode == 0, done.stderr
            # Six of 48 MiB take ten seconds at 600 kB/s, all of them 84. How much is read ahead meanwhile varies.
            assert float(done.stdout) < (70 if speed == "600 kB/s" else 30), backend
