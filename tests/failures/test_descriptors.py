"""More shards than descriptors (``ulimit -n``): they load, one after the other, in every call; and leases of others."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TESTS, interrupted_after, run_script
from safetensors.torch import save_file

import weightload

WAYS = [
    "resolve", "mmap", "pread", "direct", "load_into", "inspect", "verify", "handles", "prefetch", "simulated",
    "simulated_into", "shared", "striped",
]  # fmt: skip

# Counts what it has open while it loads: the program's own code must find descriptors, too.
SCRIPT = """
import glob, os, resource, sys, threading
sys.path.insert(0, sys.argv[4])
way, folder, limit, hard = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[5] == "hard"
import torch, weightload
from weightload import settings
if way.startswith("simulated"):
    import simulated_accelerator
    simulated_accelerator.load().set_available(True)
files = sorted(glob.glob(folder + "/*.safetensors"))
if way in ("shared", "striped"):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method="file://" + folder + "/store" + way, rank=0, world_size=1)
top = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit if hard else top))
most, stop = 0, threading.Event()
def look():
    global most
    while not stop.wait(0.001):
        most = max(most, len(os.listdir("/proc/self/fd")))
before = len(os.listdir("/proc/self/fd"))
watcher = threading.Thread(target=look); watcher.start()
def drain(**arguments):
    for name, tensor in weightload.safetensors_weights_iterator(files, show_progress=False, **arguments):
        with open("/dev/null"):
            yield name, tensor
def zeros(device="cpu"):
    return {f"layer{i}": torch.zeros(2048, device=device) for i in range(len(files))}
def into(device="cpu"):
    target = zeros(device)
    weightload.load_into(target, files, show_progress=False)
    return target
def handles():
    kept = [weightload.safe_open(file, "pt") for file in files]
    return {name: handle.get_tensor(name) for _ in range(2) for handle in kept for name in handle.keys()}
def prefetch():
    kept = [weightload.safe_open(file, "pt") for file in files]
    return {name: tensor for handle in kept for name, tensor in handle.prefetch(dict.fromkeys(handle.keys()))}
def command(*words):
    from weightload.cli import main as cli
    assert cli.main([*words, folder]) == 0
try:
    if way == "resolve": assert len(weightload.resolve_safetensors_files(folder)) == len(files)
    elif way in ("inspect", "verify"): command(way)
    else:
        loaded = {
            "mmap": lambda: dict(drain(to_cpu=True)),
            "pread": lambda: dict(drain(to_cpu=True, backend="pread")),
            "direct": lambda: direct(),
            "load_into": into, "handles": handles, "prefetch": prefetch,
            "simulated": lambda: dict(drain(device=torch.accelerator.current_accelerator())),
            "simulated_into": lambda: into(torch.accelerator.current_accelerator()),
            "shared": lambda: dict(drain(device="cpu", group=dist.group.WORLD, strategy="broadcast")),
            "striped": lambda: dict(drain(device="cpu", group=dist.group.WORLD, strategy="striped")),
        }
        def direct():
            with settings.override(read="direct"):
                return dict(drain(to_cpu=True, backend="pread"))
        got = loaded[way]()
        assert len(got) == len(files)
        for name, tensor in got.items():
            assert tensor.cpu().eq(int(name[5:])).all(), name
        del got
finally:
    stop.set(); watcher.join()
kept = max(0, most - before)
assert kept <= limit * 3 // 4, (before, most)
print("most", before, most)
"""


def _shards(folder: Path, count: int) -> Path:
    for i in range(count):
        save_file(
            {f"layer{i}": torch.full((2048,), float(i))}, folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        )
    return folder


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _shards(tmp_path_factory.mktemp("hundred"), 100)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _shards(tmp_path_factory.mktemp("thousand"), 1000)


def _load(way: str, folder: Path, limit: int, hard: bool = False) -> None:
    done = run_script(SCRIPT, way, folder, limit, TESTS, "hard" if hard else "soft")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("way", WAYS)
def test_a_hundred_shards_with_64_descriptors(way: str, hundred: Path) -> None:
    _load(way, hundred, 64, hard=True)


@pytest.mark.parametrize("way", ["resolve", "mmap", "pread", "load_into"])
def test_a_thousand_shards_with_256_descriptors(way: str, thousand: Path) -> None:
    _load(way, thousand, 256)


REPLACED = """
import glob, os, resource, sys, weightload
folder = sys.argv[1]
files = sorted(glob.glob(folder + "/*.safetensors"))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
handles = [weightload.safe_open(file, "pt", backend="pread") for file in files]
for file in files:
    with open(file, "rb") as old, open(file + ".new", "wb") as new: new.write(old.read())
    os.replace(file + ".new", file)
read, refused = 0, 0
for i, handle in enumerate(handles):
    try:
        assert handle.get_tensor(f"layer{i}").eq(i).all()
        read += 1
    except weightload.ReadError as error:
        assert error.filename == files[i] and "ulimit -n" in str(error) and error.errno is None, error
        refused += 1
print(read, refused)
assert read > 0 and refused > 0
"""


def test_a_file_that_was_replaced_while_it_was_closed_is_refused_by_name(tmp_path: Path) -> None:
    done = run_script(REPLACED, _shards(tmp_path, 100))
    assert done.returncode == 0, done.stdout + done.stderr


# Another process's write lease (Samba, an NFS server).


@contextmanager
def _leased(path: Path, seconds: float) -> Iterator[None]:
    """Another process has a lease on the file, which it lets go of so long after it was asked to."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            descriptor = os.open(path, os.O_RDWR)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(tell, b"x")
            if signal.sigtimedwait([signal.SIGIO], 60):
                time.sleep(seconds)
        finally:
            os._exit(0)
    try:
        os.close(tell)
        assert os.read(ready, 1) == b"x"
        yield
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _index(path: Path) -> Path:
    index = path.parent / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    return index


OPENINGS: dict[str, Callable[[Path], object]] = {
    "load_file": lambda path: weightload.load_file(path),
    "two files": lambda path: dict(
        weightload.safetensors_weights_iterator([path, _copy(path)], to_cpu=True, show_progress=False)
    ),
    "safe_open": lambda path: weightload.safe_open(path, "pt").get_tensor("a"),
    "index": lambda path: weightload.resolve_safetensors_files(path),
}


def _copy(path: Path) -> Path:
    copy = path.parent / "copy.safetensors"
    save_file({"b": torch.ones(10)}, copy)
    return copy


@pytest.mark.parametrize("opening", OPENINGS)
def test_an_opening_waits_for_another_process_lease(opening: str, small: Path) -> None:
    path = _index(small) if opening == "index" else small
    with _leased(path, 0.3):
        OPENINGS[opening](path)


@pytest.mark.parametrize("opening", OPENINGS)
def test_ctrl_c_is_felt_while_it_waits(opening: str, small: Path) -> None:
    path = _index(small) if opening == "index" else small
    with _leased(path, 30):
        begin = time.monotonic()
        with interrupted_after(0.3), pytest.raises(KeyboardInterrupt):
            OPENINGS[opening](path)
        assert time.monotonic() - begin < 5
