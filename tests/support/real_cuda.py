"""The knobs of a real GPU, under the names that those of the simulated accelerator have; without some, tests skip."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.torch_cuda import TorchCuda

EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_C: Any = torch._C
_started: Callable[[], bool] = torch.cuda.is_initialized
FAILED_HERE = "page-locking cannot be made to fail on a real GPU"


@functools.cache
def driver() -> ctypes.CDLL:
    """CUDA's driver, which torch has loaded."""
    return ctypes.CDLL("libcuda.so.1")


class Native(TorchCuda):
    """Devices by number, streams by torch's ids, 0 being the default one."""

    def seed_delays(self, seed: int, longest_us: int = 300) -> None:
        """A real device is as late as it is."""

    def side_streams(self, device: int) -> list[int]:
        pytest.skip("the driver does not list its streams")

    def hold_stream(self, device: int, stream: int) -> Callable[[], None]:
        """Stop a stream before its next operation, until what is returned is called."""
        word = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        chosen = torch.cuda.Stream(stream_id=stream, device_index=device, device_type=1)
        with torch.cuda.device(device):
            wait = driver().cuStreamWaitValue32_v2
            code = wait(
                ctypes.c_void_p(chosen.cuda_stream), ctypes.c_uint64(word.data_ptr()), ctypes.c_uint32(1), EQUAL
            )
        assert code == 0, f"cuStreamWaitValue32 failed: {code}"

        def release() -> None:
            word.fill_(1)

        return release

    def limit_device_memory(self, limit: int) -> None:
        """Limit the memory that torch may take from now on, beside what is in use and not cached."""
        self.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(0) + limit) / total))

    def used_bytes(self, device: int) -> int:
        return torch.cuda.memory_reserved(device)

    def fail_pinned_after(self, count: int) -> None:
        if count >= 0:
            pytest.skip(FAILED_HERE)

    def pinned_bytes(self) -> int:
        """Page-locked memory in use, once torch has given back what it keeps. Its "active_bytes" are wrong in 2.11."""
        if not _started():
            return 0
        self.synchronize(0)
        _C._host_emptyCache()
        return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))

    def pinned_made(self) -> int:
        pytest.skip("torch does not count how often it page-locked memory")

    def has_context(self, device: int) -> bool:
        return device < torch.cuda.device_count() and bool(_C._cuda_hasPrimaryContext(device))


@functools.cache
def load() -> Any:
    """The knobs; without a GPU the test fails, as it was asked for."""
    assert torch.cuda.is_available(), "WEIGHTLOAD_TEST_ACCELERATOR=gpu, and torch sees no GPU"
    torch.zeros(1, device="cuda:0")
    return Native()
