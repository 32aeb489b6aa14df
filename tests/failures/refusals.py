"""Processes to which the kernel refuses some system calls, in which every way into the library is taken.

A server imports everything once; for each case it forks a process, which refuses itself a call (a seccomp filter that
answers an errno: the real interface, on x86-64) and loads in every way. What a filter cannot tell apart, as the paths
of ``open``, is refused by a library that is loaded before libc.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import select
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ERRNOS = ("EPERM", "ENOSYS", "EINVAL", "EACCES", "EAGAIN", "ENODEV")
LIMIT_S = 120.0  # of a case


@dataclasses.dataclass(frozen=True)
class Rule:
    """Calls of one number, all or those with an argument: equal to a value, or with (without) a bit."""

    number: int
    argument: int | None = None
    equal: int | None = None
    bit: int = 0
    with_bit: bool = True


MADVISE, O_DIRECT, MAP_ANONYMOUS = 28, 0o40000, 0x20
ADVICE = {"POPULATE_READ": 22, "POPULATE_WRITE": 23, "HUGEPAGE": 14, "NOHUGEPAGE": 15, "DONTNEED": 4, "FREE": 8}

# Calls that a load can do without.
CALLS: dict[str, list[Rule]] = {
    **{f"MADV_{name}": [Rule(MADVISE, 2, value)] for name, value in ADVICE.items()},
    "madvise": [Rule(MADVISE)],
    "sched_getaffinity": [Rule(204)],
    "cachestat": [Rule(451)],
    "mincore": [Rule(27)],
    "cachestat, mincore": [Rule(451), Rule(27)],
    "cachestat, mincore, preadv2": [Rule(451), Rule(27), Rule(327)],
    "fadvise": [Rule(221)],
    "statfs": [Rule(137), Rule(138)],
    "faccessat": [Rule(269), Rule(439)],
    "getrusage": [Rule(98)],
    "uname": [Rule(63)],
    "prctl": [Rule(157)],
    "O_DIRECT": [Rule(257, 2, bit=O_DIRECT), Rule(2, 1, bit=O_DIRECT)],
    "mmap of files": [Rule(9, 3, bit=MAP_ANONYMOUS, with_bit=False)],
}
CALLS["everything"] = [
    rule for name, rules in CALLS.items() if name not in ("mmap of files", "prctl") for rule in rules
]
# By their paths.
PATHS = {
    "/proc/self/pagemap": "/proc/self/pagemap",
    "/proc/self/fd": "/proc/self/fd/",
    "/proc/meminfo": "/proc/meminfo",
    "/proc": "/proc/",
    "/sys": "/sys/",
}
# Where views of the mapped files are what is asked for, and cannot be had.
WITHOUT_VIEWS = ("mmap of files",)

SHIM = r"""
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
static char prefix[256];
static int error_number;
extern "C" void refuse_paths(const char* begin, int error) { strncpy(prefix, begin, 255); error_number = error; }
static bool refused(const char* path) {
  if (error_number == 0 || strncmp(path, prefix, strlen(prefix)) != 0) return false;
  errno = error_number;
  return true;
}
#define MODE va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest)
#define OPEN(name) extern "C" int name(const char* path, int flags, ...) { \
  MODE; static auto next = (int (*)(const char*, int, int))dlsym(RTLD_NEXT, #name); \
  return refused(path) ? -1 : next(path, flags, mode); }
#define OPENAT(name) extern "C" int name(int at, const char* path, int flags, ...) { \
  MODE; static auto next = (int (*)(int, const char*, int, int))dlsym(RTLD_NEXT, #name); \
  return refused(path) ? -1 : next(at, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
"""


def refuse(rules: list[Rule], error_number: int) -> None:
    """From now on, in this thread and all that it starts, for ever."""
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    code: list[tuple[int, int, int, int]] = []
    for rule in rules:
        code.append((load, 0, 0, 0))
        if rule.argument is None:
            code.append((equal, 0, 1, rule.number))
        else:
            code += [(equal, 0, 3, rule.number), (load, 0, 0, 16 + 8 * rule.argument)]
            if rule.equal is not None:
                code.append((equal, 0, 1, rule.equal))
            else:
                code.append((any_bit, *((0, 1) if rule.with_bit else (1, 0)), rule.bit))
        code.append((answer, 0, 0, 0x00050000 | error_number))
    code.append((answer, 0, 0, 0x7FFF0000))
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    program, libc = Program(len(code), ctypes.cast(text, ctypes.c_void_p)), ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


class Server:
    """The process that forks the cases."""

    def __init__(self, folder: Path) -> None:
        source, shim = folder / "shim.cpp", folder / "shim.so"
        source.write_text(SHIM)
        subprocess.run(["g++", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(shim), "WEIGHTLOAD_TASK_BYTES": str(1 << 20)}
        command = [sys.executable, __file__, str(folder), str(shim)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def faults(self, call: str, error: str, what: str) -> list[str]:
        """Return what went wrong: nothing, it is hoped. ``what``: ``"cold"``, ``"warm"``, ``"ranks"`` or ``"bad"``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([call, error, what]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server has ended"
        found: list[str] = json.loads(answer)
        return found

    def close(self) -> None:
        self._process.communicate(timeout=LIMIT_S)


def forked(work: Callable[[], list[str]]) -> list[str]:
    """Run ``work`` in a forked child. Return what it returns, or what became of the child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _run(work, write)
    os.close(write)
    chunks, ended = [], False
    while select.select([read], [], [], LIMIT_S)[0]:
        chunk = os.read(read, 1 << 16)
        ended = not chunk
        if ended:
            break
        chunks.append(chunk)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    status = os.waitpid(child, 0)[1]
    if not ended:
        return [f"did not end within {LIMIT_S} s"]
    if status != 0:
        return [f"ended with {os.waitstatus_to_exitcode(status)}"]
    found: list[str] = json.loads(b"".join(chunks))
    return found


def _run(work: Callable[[], list[str]], write: int) -> NoReturn:
    try:
        found = work()
    except BaseException:
        found = [traceback.format_exc()]
    with os.fdopen(write, "w") as pipe:
        json.dump(found, pipe)
    os._exit(0)


def serve(folder: Path, shim: str) -> None:
    """Answer cases, a line each, until the input ends."""
    import conftest
    import safetensors.torch
    import torch
    import torch.distributed as dist
    from safetensors.torch import _remove_duplicate_names  # noqa: F401  # imported by a load else
    from support.ways import CPU_WAYS, bytes_of, content, halves, ones_like, raw_bytes

    import weightload
    from weightload import _C

    torch.set_num_threads(1)  # OpenMP's threads do not come along
    large = [
        ("large", "U8", [(8 << 20) + 4096]),
        ("wide", "F32", [300, 1000]),
        ("odd", "U8", [77]),
        ("late", "F32", [40_000]),
    ]
    paths = [
        conftest.write_tensors(folder / "large.safetensors", large),
        conftest.write_tensors(folder / "small.safetensors", [(f"{i}", "BF16", [i, 1000]) for i in range(20)], seed=1),
    ]
    wanted = content(*paths)
    as_half = {
        name: raw_bytes(t.to(torch.float16) if t.dtype is torch.float32 else t)
        for path in paths
        for name, t in safetensors.torch.load_file(path).items()
    }

    def cast(_: list[Path]) -> dict[str, bytes]:
        half = {torch.float32: torch.float16}
        target = {n: t.to(half.get(t.dtype, t.dtype)) for path in paths for n, t in ones_like(path).items()}
        weightload.load_into(target, paths)
        return bytes_of(target)

    def into_module(_: list[Path]) -> dict[str, bytes]:
        found = {}
        for path in paths:
            module = torch.nn.Module()
            for name, tensor in ones_like(path).items():
                module.register_buffer(name, tensor)
            weightload.load_model(module, path)
            found |= bytes_of(module.state_dict())
        return found

    ways: dict[str, Callable[[list[Path]], dict[str, bytes]]] = {
        **CPU_WAYS,
        "slices-mmap": lambda paths: halves(paths, backend="mmap"),
        "load_into-cast": cast,
        "load_model": into_module,
        "load": lambda paths: bytes_of({n: t for p in paths for n, t in weightload.load(p.read_bytes()).items()}),
        "resolve": lambda paths: CPU_WAYS["iterator-pread"](
            [Path(found) for path in paths for found in weightload.resolve_safetensors_files(path)]
        ),
    }

    def in_every_way(call: str, cold: bool) -> list[str]:
        found = []
        for name, way in ways.items():
            if cold:
                conftest.evict(paths)
            try:
                same = way(paths) == (as_half if name == "load_into-cast" else wanted)
                if not same:
                    found.append(f"{name}: wrong bytes")
                elif call in WITHOUT_VIEWS and name.endswith("mmap"):
                    found.append(f"{name}: no error")
            except weightload.WeightLoadError as error:
                if call not in WITHOUT_VIEWS or not name.endswith("mmap") or 'backend="pread"' not in str(error):
                    found.append(f"{name}: {type(error).__name__}: {error}")
            except Exception as error:
                found.append(f"{name}: {type(error).__name__}: {error}")
        return found

    def with_bad_sectors() -> list[str]:
        found = []
        for name in ("iterator-mmap", "load_file-mmap", "prefetch-mmap"):
            conftest.evict(paths)
            _C.arm_fault("error", first=2, count=10**6, error_number=errno.EIO)
            try:
                ways[name](paths)
                found.append(f"{name}: no error")
            except weightload.WeightLoadError as error:
                if error.errno != errno.EIO or error.tensor is None:
                    found.append(f"{name}: {error}")
            _C.disarm_fault()
        return found

    def as_rank(rank: int, store: Path, strategy: str, call: str, number: int) -> list[str]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
        refuse_call(call, number)  # not before: what a group's backend can do without is its own business
        weights = weightload.safetensors_weights_iterator(
            paths, device="cpu", group=dist.group.WORLD, strategy=strategy
        )
        return [] if bytes_of(dict(weights)) == wanted else [f"rank {rank}, {strategy}: wrong bytes"]

    def in_ranks(call: str, number: int) -> list[str]:
        found = []
        for strategy in ("striped", "broadcast"):
            store = folder / f"store-{os.getpid()}-{strategy}"
            read, write = os.pipe()
            other = os.fork()
            if other == 0:
                _run(lambda: as_rank(1, store, strategy, call, number), write)  # noqa: B023
            os.close(write)
            found += forked(lambda: as_rank(0, store, strategy, call, number))  # noqa: B023
            with os.fdopen(read) as pipe:
                found += json.loads(pipe.read())
            os.waitpid(other, 0)
        return found

    def refuse_call(call: str, number: int) -> None:
        if call in PATHS:
            ctypes.CDLL(shim).refuse_paths(PATHS[call].encode(), number)
        else:
            refuse(CALLS[call], number)

    def case(call: str, error: str, what: str) -> list[str]:
        number = getattr(errno, error)
        if what == "ranks":
            return in_ranks(call, number)
        refuse_call(call, number)
        return with_bad_sectors() if what == "bad" else in_every_way(call, what == "cold")

    for line in sys.stdin:
        call, error, what = json.loads(line)
        sys.stdout.write(json.dumps(forked(lambda: case(call, error, what))) + "\n")  # noqa: B023
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    serve(Path(sys.argv[1]), sys.argv[2])
