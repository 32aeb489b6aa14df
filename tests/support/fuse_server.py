"""A read-only file system in user space that misbehaves on purpose, over the kernel's /dev/fuse protocol itself.

Serves the files of one folder: slowly, with short answers, with errors at an offset, past the page cache, and counts
the bytes it has served. Root and /dev/fuse are needed, and no package. ``mounted`` below, which tests use, runs it as a
program.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Operations and flags of linux/fuse.h.
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR = (
    1,
    2,
    3,
    14,
    15,
    17,
    18,
    26,
    27,
    28,
    29,
)
INTERRUPT, BATCH_FORGET = 36, 42
ASYNC_READ, FOPEN_DIRECT_IO = 1, 1
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
LARGEST_REQUEST = 1 << 18
ROOT = 1
SERVED = ".served"  # a file, not listed, with the number of bytes that were read of the others


@dataclasses.dataclass
class Faults:
    """Faults of the file system."""

    direct_io: bool = False
    short: bool = False
    """Reads return any number of bytes, as may be with direct I/O."""
    delay_s: float = 0.0
    """Before each answer to a read at ``delay_from`` bytes or more of a file."""
    delay_from: int = 0
    bytes_per_s: float = 0.0
    """The speed of all reads from ``delay_from`` on together; 0: without limit."""
    error_from: int = -1
    """Reads that touch these bytes of a file fail with EIO; -1: none."""
    error_to: int = -1
    holds: str = ""
    """While there is a file of this path outside, each question for a file's attributes makes one of that name and
    ``.met``, and gets its answer when that is gone, or after 10 s; one of ``.late`` says that it was so."""
    threads: int = 1
    """How many requests are served at once."""


class Server:
    def __init__(self, folder: str, mount: str, faults: Faults) -> None:
        self.folder, self.faults = folder, faults
        self.names = sorted(os.listdir(folder))
        self.served = 0
        self.lock = threading.Lock()
        self.turn = threading.Lock()
        self.device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"weightload", os.fsencode(mount), b"fuse.weightload", 0, options) != 0:
            raise OSError(ctypes.get_errno(), "cannot mount")

    def run(self) -> None:
        others = [threading.Thread(target=self.serve, daemon=True) for _ in range(self.faults.threads - 1)]
        for thread in others:
            thread.start()
        self.serve()

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.device, LARGEST_REQUEST)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # unmounted
            _, operation, unique, node, *_ = IN_HEADER.unpack_from(request)
            if operation in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            try:
                code, data = 0, self.answer(operation, node, request[IN_HEADER.size :])
            except OSError as error:
                code, data = -(error.errno or errno.EIO), b""
            with contextlib.suppress(OSError):
                os.write(self.device, OUT_HEADER.pack(OUT_HEADER.size + len(data), code, unique) + data)

    def answer(self, operation: int, node: int, body: bytes) -> bytes:
        if operation == INIT:
            major, minor, read_ahead, flags = struct.unpack_from("<IIII", body)
            del major, minor
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, read_ahead, flags & ASYNC_READ, 0, 0, 1 << 17, 1, 0, 0, 0)
        if operation == LOOKUP:
            name = os.fsdecode(body.rstrip(b"\0"))
            if name != SERVED and name not in self.names:
                raise OSError(errno.ENOENT, name)
            number = 2 + len(self.names) if name == SERVED else 2 + self.names.index(name)
            valid = 0 if self.faults.holds else 1
            return struct.pack("<QQQQII", number, 0, 0, valid, 0, 0) + self.attributes(number)
        if operation == GETATTR:
            self.hold(node)
            return struct.pack("<QII", 0 if self.faults.holds else 1, 0, 0) + self.attributes(node)
        if operation == OPEN:
            past = self.faults.direct_io or node == 2 + len(self.names)
            return struct.pack("<QII", 0, FOPEN_DIRECT_IO if past else 0, 0)
        if operation == OPENDIR:
            return struct.pack("<QII", 0, 0, 0)
        if operation == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return self.read(node, offset, size)
        if operation == READDIR:
            _, offset, size = struct.unpack_from("<QQI", body)
            return self.list(offset, size)
        if operation == STATFS:
            return struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if operation in (RELEASE, RELEASEDIR):
            return b""
        raise OSError(errno.ENOSYS, "not served")

    def hold(self, node: int) -> None:
        if node == ROOT or not self.faults.holds or not os.path.exists(self.faults.holds):
            return
        until = time.monotonic() + 10  # a process that waits cannot be killed
        met, late = (self.faults.holds + end for end in (".met", ".late"))
        open(met, "wb").close()
        while os.path.exists(met):
            if time.monotonic() > until:
                open(late, "wb").close()
                return
            time.sleep(0.002)

    def attributes(self, node: int) -> bytes:
        if node == ROOT:
            return ATTRIBUTES.pack(ROOT, 4096, 8, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
        size = 20 if node == 2 + len(self.names) else os.stat(self.path(node)).st_size
        return ATTRIBUTES.pack(node, size, size // 512 + 1, 1000, 1000, 1000, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)

    def path(self, node: int) -> str:
        return os.path.join(self.folder, self.names[node - 2])

    def read(self, node: int, offset: int, size: int) -> bytes:
        if node == 2 + len(self.names):
            return (b"%020d" % self.served)[offset : offset + size]
        faults = self.faults
        if offset + size > faults.delay_from:
            if faults.delay_s:
                time.sleep(faults.delay_s)
            if faults.bytes_per_s:
                with self.turn:
                    time.sleep(size / faults.bytes_per_s)
        if offset < faults.error_to and offset + size > faults.error_from:
            raise OSError(errno.EIO, "a bad sector")
        if faults.short:
            size = random.randint(1, size)
        with open(self.path(node), "rb") as file:
            file.seek(offset)
            data = file.read(size)
        with self.lock:
            self.served += len(data)
        return data

    def list(self, offset: int, size: int) -> bytes:
        result = b""
        for at, name in enumerate(self.names[offset:], offset):
            encoded = os.fsencode(name)
            one = struct.pack("<QQII", 2 + at, at + 1, len(encoded), 8) + encoded
            one += b"\0" * (-len(one) % 8)
            if len(result) + len(one) > size:
                break
            result += one
        return result


def why_not() -> str | None:
    """Why there is no such file system here; None where there is."""
    if os.geteuid() != 0:
        return "only root mounts"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"no /dev/fuse: {error}"
    return None


@contextlib.contextmanager
def mounted(folder: Path, mount: Path, **faults: object) -> Iterator[Path]:
    """Serve the files of a folder at another, in a process of its own."""
    mount.mkdir(exist_ok=True)
    command = [sys.executable, "-S", __file__, str(folder), str(mount), json.dumps(faults)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == "mounted\n"
            yield mount
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=False)
            server.kill()


def served(mount: Path) -> int:
    """Bytes of files that have been read so far."""
    return int((mount / SERVED).read_text())


if __name__ == "__main__":
    here = Server(sys.argv[1], sys.argv[2], Faults(**json.loads(sys.argv[3])))
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    here.run()
