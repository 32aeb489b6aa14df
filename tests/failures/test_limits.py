"""Limits of the process: descriptors, address space, threads, memory of its control group."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, run_script, write_tensors

pytestmark = pytest.mark.alone

SIMULATED = """
import simulated_accelerator
native = simulated_accelerator.load()
native.set_available(True)
"""
# Shared by the scripts: ways to load, named by the first argument, and limits by what the process has already.
PROLOGUE = """
import gc, os, resource, sys
import torch, weightload
from weightload import settings
from weightload._checkpoint.selection import open_files

sys.path.insert(0, os.environ["TESTS"])
from conftest import running_threads, thread_count as threads

def into(paths, device):
    target = {name: torch.empty(SIZE, dtype=torch.uint8, device=device) for name in NAMES}
    return weightload.load_into(target, paths, strict=False)

def every(paths, **options):
    total = 0
    for name, tensor in weightload.safetensors_weights_iterator(paths, **options):
        total += tensor.nbytes
    return total

ways = {
    "iterator-mmap": lambda paths: every(paths, to_cpu=True),
    "iterator-pread": lambda paths: every(paths, to_cpu=True, backend="pread"),
    "load_file-mmap": lambda paths: [weightload.load_file(path) for path in paths],
    "load_file-pread": lambda paths: [weightload.load_file(path, backend="pread") for path in paths],
    "load_into": lambda paths: into(paths, "cpu"),
    "simulated": lambda paths: every(paths, device="simulated:0"),
    "simulated-load_into": lambda paths: into(paths, "simulated:0"),
}
chosen, paths = sys.argv[1].split(), sys.argv[2:]
gc.collect()
gc.freeze()  # as in conftest.py

def used(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) * 1024

def settle():
    # Threads that were joined count until the kernel has let go of them.
    while len(os.listdir("/proc/self/task")) > len(running_threads()):
        os.sched_yield()

def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
"""
CPU = "iterator-mmap iterator-pread load_file-mmap load_file-pread load_into"
# All of them in one process: starting one takes longer than all the loads.
WAYS = [CPU, pytest.param("simulated simulated-load_into", marks=pytest.mark.simulated)]


def run_ways(ways: str, script: str, *paths: object, size: int, names: list[str], **options: Any) -> None:
    """Run a script, for each way that it may load by, in a process of its own."""
    start = PROLOGUE + (SIMULATED if "simulated" in ways else "") + f"SIZE, NAMES = {size}, {names!r}\n"
    loop = "for name in chosen:\n    way = ways[name]\n" + textwrap.indent(textwrap.dedent(script), "    ")
    environment = {**os.environ, "TESTS": str(TESTS)}
    done = run_script(start + loop, ways, *paths, env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("ways", WAYS)
def test_more_files_than_descriptors(ways: str, tmp_path: Path) -> None:
    """One descriptor is enough for any number of files; without any, EMFILE names the file that it hit."""
    files = [write_tensors(tmp_path / f"{i}.safetensors", [(f"{i}", "U8", [100])]) for i in range(64)]
    script = """
        way(paths[:1])
        before = descriptors()
        taken = before - 1  # not the one that was open to count them
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        failed = 0
        for more in [0, 1, 5, 63, 64, 100, 128, 200]:
            limit = taken + more
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                way(paths)
            except OSError as error:
                assert (error.errno, error.filename in paths) == (24, True), error
                assert more == 0
                failed += 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (descriptors(), threads()) == (before, 0), limit
        assert failed == 1, failed
        way(paths)
        assert descriptors() == before
    """
    run_ways(ways, script, *files, size=100, names=[str(i) for i in range(64)])


@pytest.mark.parametrize("ways", [CPU])
def test_too_little_address_space(ways: str, tmp_path: Path) -> None:
    """From nothing to enough: an error that is one of memory, or the load; never a crash.

    Nor from a thread that throws for the first time: what it needs for that is thread-local data, too. Not to an
    accelerator: its threads use torch's thread-local data, and where there is no memory for that of a new thread the C
    library ends the process.
    """
    files = [write_tensors(tmp_path / "a.safetensors", [(f"{i}", "U8", [3 << 20]) for i in range(16)])]
    script = """
        os.environ["WEIGHTLOAD_SPARE_BYTES"] = "0"  # what is kept would be enough
        way(paths)
        gc.collect()
        before = descriptors()
        outcomes = []
        for megabytes in [0, 0, 0.1, 0.2, 0.5, 1, 2, 8, 14, 20, 32, 64, 1024]:
            limit = used("VmSize") + int(megabytes * (1 << 20))
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            try:
                way(paths)
                outcomes.append("loaded")
            except MemoryError as error:
                outcomes.append(str(error))
            except weightload.WeightLoadError as error:  # no stack for a thread
                assert error.errno == 11, error
                outcomes.append(str(error))
            except RuntimeError as error:  # torch's own allocations
                assert "alloc" in str(error) or "memory" in str(error), error
                outcomes.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert (descriptors(), threads()) == (before, 0), megabytes
        assert outcomes[-1] == "loaded", outcomes
        assert outcomes[0] != "loaded" or name == "load_into", outcomes  # into memory that was freed before
        way(paths)
    """
    run_ways(ways, script, *files, size=3 << 20, names=[str(i) for i in range(16)])


@pytest.mark.parametrize("ways", WAYS)
def test_no_threads(ways: str, tmp_path: Path) -> None:
    """Loads work with few threads. If none may be started, the caller does the work; one is enough."""
    if os.geteuid() != 0:
        pytest.skip("the threads of all of a user's processes count, and only root can become a user who has no other")
    write_tensors(tmp_path / "a.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(8)])
    write_tensors(tmp_path / "b.safetensors", [("b", "U8", [1])])
    tmp_path.chmod(0o755)
    script = """
        for _ in range(8):  # an accelerator's streams, which the simulation makes of threads, are made on first use
            way(paths)
        before = descriptors()
        if os.geteuid() == 0:  # whom the limit does not bind; the other has no other threads
            nobody = 20_000 + os.getpid() % 40_000
            os.setgroups([]); os.setgid(nobody); os.setuid(nobody)
        settle()
        here = len(os.listdir("/proc/self/task"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)

        def load_with(load, given, more):
            settle()
            resource.setrlimit(resource.RLIMIT_NPROC, (here + more if more else 0, hard))
            try:
                with settings.override(threads=4, task_bytes=1 << 20):
                    load(given)
            finally:
                resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
                assert (descriptors(), threads()) == (before, 0)

        # Several files have threads of their own for their headers, which may still count when others start.
        for more in (0, 1, 2, 3):
            load_with(way, paths[:1], more)
        for more in (0, 1):
            load_with(open_files, paths, more)
        load_with(way, paths, 8)
    """
    names = [str(i) for i in range(8)]
    run_ways(ways, script, "a.safetensors", "b.safetensors", size=1 << 20, names=names, cwd=tmp_path)


# Control groups


@contextmanager
def control_group(most_bytes: int) -> Iterator[Path]:
    """A group below this process's own, so that its limits still hold, with a limit on memory."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, root, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            own, limit = Path(root + groups["memory"]), "memory.limit_in_bytes"
        elif kind == "cgroup2" and (Path(root + groups.get("", "/")) / "memory.max").exists():
            own, limit = Path(root + groups[""]), "memory.max"
        else:
            continue
        try:
            made = Path(tempfile.mkdtemp(prefix="weightload-test-", dir=own))
        except OSError as problem:
            pytest.skip(f"no control group can be made here: {problem}")
        try:
            try:
                (made / limit).write_text(str(most_bytes))
            except OSError as problem:
                pytest.skip(f"the control group takes no limit of memory: {problem}")
            yield made
        finally:
            made.rmdir()
        return
    pytest.skip("no control groups of memory here")


@pytest.mark.parametrize(
    "options",
    [
        {"to_cpu": True, "backend": "mmap"},
        {"to_cpu": True, "backend": "pread"},
        pytest.param({"device": "simulated:0"}, marks=pytest.mark.simulated),
    ],
    ids=["mmap", "pread", "simulated"],
)
def test_a_checkpoint_larger_than_the_control_groups_memory(options: dict[str, Any], tmp_path: Path) -> None:
    """Iterated over and dropped, 400 MB pass through a process that may have 160 MB more."""
    size, names = 4 << 20, [str(i) for i in range(100)]
    path = write_tensors(tmp_path / "much.safetensors", [(name, "U8", [size]) for name in names])
    script = """
        options, group = eval(paths[1]), paths[2]
        open(group + "/cgroup.procs", "w").write(str(os.getpid()))
        with settings.override(window_bytes=16 << 20, block_bytes=8 << 20, device_block_bytes=16 << 20,
                               slot_bytes=4 << 20, pinned_bytes=16 << 20):
            assert every(paths[:1], **options) == 400 << 20
    """
    with control_group(160 << 20) as group:
        # Memory that the process has at this point is its parent group's.
        way = "simulated" if "device" in options else "iterator-mmap"
        run_ways(way, script, path, repr(options), group, size=size, names=names)


@pytest.mark.parametrize("ways", WAYS)
def test_no_memory_may_be_locked(ways: str) -> None:
    """Whoever may not lock a page (no privilege, RLIMIT_MEMLOCK 0) loads all the same."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = write_tensors(Path(folder) / "a.safetensors", [(f"{i}", "U8", [1 << 20]) for i in range(20)])
        path.chmod(0o644)
        script = """
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
            if os.geteuid() == 0:
                os.setgroups([]); os.setgid(65534); os.setuid(65534)
            way(paths)
            assert threads() == 0
        """
        run_ways(ways, script, path, size=1 << 20, names=[str(i) for i in range(20)])
