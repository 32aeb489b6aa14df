"""A file system in user space with one file, whose times are of no use. Speaks the kernel's protocol itself.

Run as a program: ``fuse_clock.py MOUNTPOINT BACKING CLOCK FLAGS`` serves BACKING as ``MOUNTPOINT/x.safetensors`` until
it is unmounted. It reads BACKING anew for every request, so that a test changes what is served.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# name: time of modification and of the status, by the real ones
CLOCKS = {
    "honest": lambda real, _: (real, real),
    "now": lambda _, now: (now, now),
    "seconds": lambda _, now: (now // 10**9 * 10**9, now // 10**9 * 10**9),
    "modified-now": lambda _, now: (now, 10**18),
    "random": lambda *_: (random.randrange(10**18), random.randrange(10**18)),
    "still": lambda *_: (10**18, 10**18),
    "zero": lambda *_: (0, 0),
}
# Flags. direct: past the page cache. cached: attributes for a second. renumbered: a new inode number at each look-up.
# unnamed: it does not say what kind of file system it is.

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, INTERRUPT, DESTROY, BATCH_FORGET = (
    1, 2, 3, 14, 15, 17, 18, 25, 26, 36, 38, 42,
)  # fmt: skip
ROOT_NODE = 1
MAX_WRITE = 128 << 10


class Server:
    """Answers requests until the file system is unmounted."""

    def __init__(self, device: int, backing: str, clock: str, flags: str) -> None:
        self.device, self.backing, self.times = device, backing, CLOCKS[clock]
        self.flags = flags.split(",")
        self.numbers = itertools.count(2)

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.device, MAX_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                return  # ENODEV: unmounted
            _, code, unique, node, *_ = struct.unpack_from("<IIQQIIII", request)
            if code in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            answer = self.answer(code, node, request[40:])
            number, body = (answer, b"") if isinstance(answer, int) else (0, answer)
            try:
                os.write(self.device, struct.pack("<IiQ", 16 + len(body), -number, unique) + body)
            except OSError as error:
                if error.errno != errno.ENOENT:  # the process that asked has gone
                    raise

    def answer(self, code: int, node: int, body: bytes) -> bytes | int:
        if code == INIT:
            numbers = (7, 31, 128 << 10, 0, 16, 12, MAX_WRITE, 1, 32, 0, *[0] * 8)
            return struct.pack("<IIIIHHIIHH8I", *numbers)
        valid = 1 if "cached" in self.flags else 0
        if code == LOOKUP:
            if body.rstrip(b"\0") != b"x.safetensors":
                return errno.ENOENT
            number = next(self.numbers) if "renumbered" in self.flags else 2
            return struct.pack("<QQQQII", number, 0, valid, valid, 0, 0) + self.attributes(number)
        if code == GETATTR:
            return struct.pack("<QII", valid, 0, 0) + self.attributes(node)
        if code == OPEN:
            return struct.pack("<QII", 0, 1 if "direct" in self.flags else 0, 0)
        if code == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            with open(self.backing, "rb") as file:
                return os.pread(file.fileno(), size, offset)
        if code == STATFS and "unnamed" not in self.flags:
            return struct.pack("<5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
        return b"" if code in (RELEASE, FLUSH, DESTROY) else errno.ENOSYS

    def attributes(self, node: int) -> bytes:
        if node == ROOT_NODE:
            return struct.pack("<6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)
        real = os.stat(self.backing)
        modified, status = (divmod(when, 10**9) for when in self.times(real.st_mtime_ns, time.time_ns()))
        return struct.pack(
            "<6Q10I", node, real.st_size, 0, modified[0], modified[0], status[0], 0, modified[1], status[1],
            stat.S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0,
        )  # fmt: skip


def main(mount_point: str, backing: str, clock: str, flags: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"clock", os.fsencode(mount_point), b"fuse", 6, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount")
    Server(device, backing, clock, flags).serve()


def available() -> bool:
    """Whether this process may mount such a file system."""
    return (
        os.geteuid() == 0 and os.path.exists("/dev/fuse") and "nodev\tfuse\n" in Path("/proc/filesystems").read_text()
    )


@contextmanager
def mounted(mount_point: Path, backing: Path, clock: str, flags: str = "") -> Iterator[Path]:
    """The served file, for as long as the block lasts."""
    mount_point.mkdir(exist_ok=True)
    command = [sys.executable, __file__, str(mount_point), str(backing), clock, flags]
    with subprocess.Popen(command) as server:
        try:
            path = mount_point / "x.safetensors"
            deadline = time.monotonic() + 60
            while not path.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the file system was not mounted")
                time.sleep(0.02)
            yield path
        finally:
            subprocess.run(["umount", "--lazy", str(mount_point)], check=False)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
