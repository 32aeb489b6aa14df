"""Threads of the core that run Python code: the garbage collector's finalisers in it, and the interpreter's end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TESTS, run_script
from safetensors.torch import save_file

checksums = pytest.importorskip("awscrt.checksums")


@pytest.fixture
def checked(tmp_path: Path) -> list[str]:
    """Two files of 8 MB and, behind each path, what verify= says of it."""
    said = []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        tensors = {f"{number}.{i}": torch.randint(0, 256, (1_000_001,), dtype=torch.uint8) for i in range(8)}
        save_file(tensors, path)
        said += [str(path), f"crc32c:{checksums.crc32c(path.read_bytes()):08x}"]
    return said


LOAD = """
import gc, os, sys, threading, time
import weightload
from weightload import _C, settings
paths = sys.argv[1::2]
digests = {os.path.basename(path): value for path, value in zip(paths, sys.argv[2::2])}
def checked(**options):
    return weightload.safetensors_weights_iterator(paths, to_cpu=True, backend="pread", verify=digests, **options)
def descriptors():
    return len(os.listdir("/proc/self/fd"))
def core_threads():
    names = ["weightload"]
    until = time.monotonic() + 20
    while "weightload" in names and time.monotonic() < until:  # the kernel shows one for a moment after its end
        names = names_of_threads()
    return names.count("weightload")
def names_of_threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(open(f"/proc/self/task/{task}/comm").read().strip())
        except OSError:  # it has ended
            pass
    return names
"""


def test_a_load_that_its_own_thread_collects(checked: list[str]) -> None:
    """The thread cannot wait for itself. Somebody else closes the load, and nothing of it stays."""
    done = run_script(
        LOAD
        + """
from weightload._verify.crc_tap import FileTap
take, armed, collects, collected = FileTap.take, [], threading.Event(), threading.Event()
def taking(tap, begin, data):
    take(tap, begin, data)
    try:
        armed.pop()
    except IndexError:  # by another thread, or not yet
        return
    collects.wait()
    gc.collect()
    collected.set()
FileTap.take = taking
gc.disable()
dict(checked())
before = descriptors()
class Cycle:
    pass
for number in range(20):
    armed.append(True)
    with settings.override(task_bytes=65536, threads=2):
        cycle = Cycle()
        cycle.weights, cycle.itself = checked(), cycle
    del cycle
    collects.set()
    collected.wait()
    collects.clear()
    collected.clear()
gc.collect()
dict(checked())
print(descriptors() - before, core_threads())
""",
        *checked,
    )
    assert (done.returncode, done.stdout) == (0, "0 0\n"), done.stderr


def test_exits_with_checked_loads_in_daemon_threads(checked: list[str]) -> None:
    script = (
        LOAD
        + """
begun = threading.Event()
def load_for_ever():
    while True:
        for name, tensor in checked():
            begun.set()
for _ in range(3):
    threading.Thread(target=load_for_ever, daemon=True).start()
begun.wait()
"""
    )
    for _ in range(8):
        done = run_script(script, *checked, timeout=60)
        assert done.returncode == 0, done.stderr


def test_an_exit_while_the_kernel_holds_a_thread_that_will_want_the_gil(checked: list[str]) -> None:
    """It comes when nobody waits for it any more, and must not end the process by that."""
    done = run_script(
        LOAD
        + """
import atexit, time
_C.arm_fault("delay", first=3, count=10**6, delay_ms=10_500)
before = _C.reads_since_armed()
threading.Thread(target=lambda: dict(checked()), daemon=True).start()
while _C.reads_since_armed() < 4:
    time.sleep(0.01)
@atexit.register  # runs before the core's, as what is registered last does first
def note():
    print("exiting", flush=True)
""",
        *checked,
    )
    assert (done.returncode, done.stdout) == (0, "exiting\n"), done.stderr
    assert "FATAL" not in done.stderr


def test_nothing_is_left_to_the_garbage_collector(checked: list[str]) -> None:
    """Descriptors are closed with the load: when it ends, is left, or fails, and while its exception lives."""
    done = run_script(
        LOAD
        + """
import torch
gc.disable()
dict(checked())
before = descriptors()
found = []
for backend in ("pread", "mmap"):
    for _ in range(3):
        dict(weightload.safetensors_weights_iterator(paths, to_cpu=True, backend=backend, verify=digests))
    found.append(descriptors() - before)
for _ in range(3):
    weightload.load_file(paths[0], verify=digests, backend="pread")
found.append(descriptors() - before)
left = checked()
next(left)
left.close()
found.append(descriptors() - before)
right = dict(digests)
digests[os.path.basename(paths[1])] = "crc32c:00000000"
kept = []
for load in (lambda: dict(checked()), lambda: weightload.load_file(paths[1], verify=digests)):
    try:
        load()
    except weightload.errors.ChecksumError as error:
        kept.append(error)
    found.append(descriptors() - before)
print(found, len(kept))
""",
        *checked,
    )
    assert (done.returncode, done.stdout) == (0, "[0, 0, 0, 0, 0, 0] 2\n"), done.stdout + done.stderr


def test_nothing_is_kept_by_an_exception_at_any_line(checked: list[str]) -> None:
    """Nothing is kept by an exception that a signal's handler raises at any line while a checked load is made."""
    done = run_script(
        LOAD
        + """
import weightload._verify as room
gc.disable()
dict(checked())
gc.collect()
before = descriptors()
folder = os.path.dirname(room.__file__)
class Stop(Exception):
    pass
number = 0
while True:
    count = 0
    def trace(frame, event, argument):
        global count
        if not frame.f_code.co_filename.startswith(folder) or "digests" in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == number:
                raise Stop
        return trace
    sys.settrace(trace)
    try:
        weights = checked()
    except Stop:
        pass
    else:
        sys.settrace(None)
        weights.close()
        del weights
        if count < number:
            break
    finally:
        sys.settrace(None)
    gc.collect()
    assert descriptors() == before, number
    number += 1
print(number > 50)
""",
        *checked,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stdout + done.stderr


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The address of a file of 24 MB, and its SHA-256."""
    pytest.importorskip("obstore")
    monkeypatch.syspath_prepend(TESTS / "remote")
    from servers import serving

    path = tmp_path / "served.safetensors"
    save_file({f"{i}": torch.randint(0, 256, (3_000_000,), dtype=torch.uint8) for i in range(8)}, path)
    with serving(tmp_path) as web:
        yield [web.address(path.name), hashlib.sha256(path.read_bytes()).hexdigest()]


def test_an_exit_with_a_load_from_a_server_that_was_left_half_way(served: list[str]) -> None:
    """Python ends the thread that hashes. Whatever closes the load after that does not wait for it."""
    done = run_script(
        """
        import sys, weightload
        from weightload import settings
        address, digest = sys.argv[1:]
        with settings.override(task_bytes=65536, window_bytes=1 << 20):
            weights = weightload.safetensors_weights_iterator(
                [address], to_cpu=True, verify={"served.safetensors": digest})
        print(next(weights)[0])
        """,
        *served,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


COLLECT = """
import gc, sys, threading, time, weightload
from weightload import settings
from weightload._remote.direct import Direct
from weightload._verify import checker, tap
address, digest = sys.argv[1:3]
gc.disable()
begun, collected = [], threading.Event()
Direct.begin = lambda self, *_: None  # so that the library's thread has the answers
def collect(name):
    if begun and threading.current_thread().name == name:
        begun.clear()
        gc.collect()
        collected.set()
put, take = tap.Reading.put, tap.Reading.take
def collecting_put(self, *rest):
    collect("weightload-remote")
    return put(self, *rest)
def collecting_take(self, at):
    collect("weightload-verify")
    return take(self, at)
if sys.argv[3] == "loop":
    tap.Reading.put = collecting_put
else:
    tap.Reading.take = collecting_take
class Cycle:
    pass
def load():
    return weightload.safetensors_weights_iterator([address], to_cpu=True, verify={"served.safetensors": digest})
cycle = Cycle()
with settings.override(task_bytes=1 << 20, window_bytes=1 << 30, threads=2, requests=2):
    cycle.weights, cycle.itself = load(), cycle
next(cycle.weights)
begun.append(True)
del cycle
print(collected.wait(30), len(dict(load())))
gc.collect()
print([thread.name for thread in threading.enumerate() if thread.name == "weightload-verify"])
"""


@pytest.mark.parametrize("thread", ["loop", "verify"])
def test_a_load_that_is_collected_by_the_thread_it_waits_for(served: list[str], thread: str) -> None:
    """In the middle of what it does with a lock held; other loads go on."""
    done = run_script(COLLECT, *served, thread, timeout=100)
    assert (done.returncode, done.stdout) == (0, "True 8\n[]\n"), done.stdout + done.stderr


def test_a_finaliser_that_asks_a_load_for_more(checked: list[str]) -> None:
    """In a thread of that load, while its consumer waits for the thread."""
    done = run_script(
        LOAD
        + """
from weightload._verify.crc_tap import FileTap
said = []
class Finaliser:
    def __del__(self):
        try:
            next(weights)
        except weightload.WeightLoadError as error:
            said.append("another load waits for" in str(error))
waiting = [Finaliser()]
main, take = threading.get_ident(), FileTap.take
def taking(tap, begin, data):
    take(tap, begin, data)
    if started.is_set() and threading.get_ident() != main:
        waiting.clear()
FileTap.take = taking
started = threading.Event()
_C.arm_fault("delay", first=0, count=10**6, delay_ms=20)
with settings.override(task_bytes=1 << 20, window_bytes=1 << 20, threads=1):
    weights = checked()
started.set()
try:
    print(len(list(weights)) == 16 and not said)
except weightload.WeightLoadError as error:  # who meddles with a load ends it
    print("left before" in str(error) and said == [True])
""",
        *checked,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stdout + done.stderr
