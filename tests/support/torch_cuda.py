"""Ask CUDA's torch itself about devices, real or simulated: the knobs that both have."""

from __future__ import annotations

from typing import Any

import torch

_C: Any = torch._C


class TorchCuda:
    """Devices by number."""

    def set_available(self, available: bool) -> None:
        assert available, "CUDA stays available"

    def has_context(self, device: int) -> bool:
        raise NotImplementedError

    def synchronize(self, device: int) -> None:
        if self.has_context(device):
            torch.cuda.synchronize(device)

    def empty_cache(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            _C._host_emptyCache()

    def live_bytes(self, device: int) -> int:
        if not self.has_context(device):
            return 0
        self.synchronize(device)
        torch.cuda.empty_cache()  # looks which memory, freed while other streams used it, has become free
        return torch.cuda.memory_allocated(device)

    def reset_peak(self, device: int) -> None:
        torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self, device: int) -> int:
        return torch.cuda.max_memory_allocated(device)
