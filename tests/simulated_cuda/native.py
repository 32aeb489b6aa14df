"""The knobs of the simulated CUDA, under the names that those of the simulated accelerator have."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.torch_cuda import TorchCuda

DEVICES = 2
_HANDLES = 4096


@functools.cache
def runtime() -> ctypes.CDLL:
    """The simulated runtime, which torch has loaded.

    Raises:
        RuntimeError: torch runs on another.
    """
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libcudart.so.13" in line}
    for path in paths:
        library = ctypes.CDLL(path)
        if hasattr(library, "simulated_cuda_seed"):
            library.simulated_cuda_streams.restype = ctypes.c_size_t
            for name in ("used", "peak", "locked", "locked_made", "reports"):
                getattr(library, f"simulated_cuda_{name}").restype = ctypes.c_size_t
            return library
    raise RuntimeError("torch does not run on the simulated CUDA here")


class Native(TorchCuda):
    """The whole of it; devices by number, streams by torch's ids, 0 being the default one."""

    def __init__(self) -> None:
        self._library = runtime()

    def seed_delays(self, seed: int, longest_us: int = 300) -> None:
        self._library.simulated_cuda_seed(ctypes.c_uint64(seed), ctypes.c_uint64(longest_us))

    def side_streams(self, device: int) -> list[int]:
        """All streams but the default one, the pool's among them."""
        torch.cuda.Stream(device)  # makes the pool
        torch.cuda.Stream(device, priority=-1)
        handles = (ctypes.c_void_p * _HANDLES)()
        count = self._library.simulated_cuda_streams(device, handles, ctypes.c_size_t(_HANDLES))
        return [int(handle) for handle in handles[:count] if handle]

    def communicator_streams(self, device: int) -> list[int]:
        return []  # they are among the side streams

    def hold_stream(self, device: int, stream: int) -> Callable[[], None]:
        """Stop a stream before its next operation, until what is returned is called."""
        handle = stream
        if stream and stream < 1 << 32:  # torch's number, not a pointer
            handle = torch.cuda.Stream(stream_id=stream, device_index=device, device_type=1).cuda_stream
        torch.cuda.init()
        gate = self._library.simulated_cuda_hold(device, ctypes.c_void_p(handle))
        assert gate > 0
        return lambda: self._library.simulated_cuda_release(gate)

    def _settle(self) -> None:
        for device in range(DEVICES):
            self.synchronize(device)
        torch._C._host_emptyCache()

    def limit_device_memory(self, limit: int) -> None:
        """Limit the memory that the devices have from now on, beside what is in use and not cached."""
        self.empty_cache()
        for device in range(DEVICES):
            self._library.simulated_cuda_limit(device, ctypes.c_size_t(min(limit, 8 << 30)))

    def used_bytes(self, device: int) -> int:
        """By the runtime's count, with what torch keeps in its caches."""
        return int(self._library.simulated_cuda_used(device))

    def fail_pinned_after(self, count: int) -> None:
        if count >= 0:
            self._settle()
        self._library.simulated_cuda_fail_locked_after(ctypes.c_long(count))

    def pinned_bytes(self) -> int:
        """Page-locked memory in use. Torch notices what became free when it is asked for some."""
        if not self._library.simulated_cuda_locked():
            return 0
        self._settle()
        return int(torch.cuda.host_memory_stats().get("active_bytes.current", 0))

    def pinned_made(self) -> int:
        return int(self._library.simulated_cuda_locked_made())

    def has_context(self, device: int) -> bool:
        return bool(self._library.simulated_cuda_has_context(device))

    def stop_streams(self) -> None:
        pass

    def abort_groups(self) -> None:
        pass


@functools.cache
def load() -> Any:
    """The simulated CUDA, which torch runs on."""
    return Native()


def reports_file() -> Path:
    """Where every process's reports go: see runtime/report.h."""
    return Path(os.environ["WEIGHTLOAD_SIMULATED_CUDA_REPORTS"])


def take_reports() -> list[str]:
    """The reports since the last call."""
    path = reports_file()
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines
