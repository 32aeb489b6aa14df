"""Checks a load: every tensor of the files, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

SAMPLE = 50
PIECE = 64 << 20
END = 64 << 10

# The loads that compare_loaders.py compares with safetensors' mapped files, in the words of its results.
UNTIMED = (
    "one untimed load of each loader: names, and of every tensor dtype, shape, device and every byte, once all are "
    f"held; of at most {SAMPLE} tensors every byte also as they are yielded"
)
TIMED = (
    f"every timed load: names, and of at most {SAMPLE} tensors dtype, shape, device and {END >> 10} KiB at either end"
)
RANKS = (
    "one untimed load of each way by several ranks: on every rank names, and of every tensor dtype, shape and every "
    "byte, once all are held; their timed loads: nothing"
)


class Checkpoint:
    """The CPU tensors of the files, as safetensors maps them, and a sample of their names."""

    def __init__(self, files: list[str]) -> None:
        from safetensors import safe_open

        self.file_of: dict[str, str] = {}
        self._opened: dict[str, Any] = {}
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        sizes: list[tuple[int, str]] = []
        for file in files:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                    self.file_of[name] = file
                    sizes.append((opened.get_tensor(name).nbytes, name))  # a view: reads nothing
        names = list(self.file_of)
        sizes.sort()
        picked = [sizes[-1][1], sizes[0][1], names[-1], names[0], *names[:: max(1, len(names) // SAMPLE)]]
        self.sample = set(list(dict.fromkeys(picked))[:SAMPLE])

    def differs(self, tensors: dict[str, torch.Tensor], device: torch.device, whole: bool) -> str | None:
        """Describes wrong tensors; not ``whole``: only their two ends are compared."""
        for name, tensor in tensors.items():
            wrong = self._difference(tensor, self._expected(name), device, whole)
            if wrong:
                return f"{name}: {wrong}"
        return None

    def _expected(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        file = self.file_of[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt", device="cpu")
        tensor: torch.Tensor = self._opened[file].get_tensor(name)
        return tensor

    def _difference(
        self, tensor: torch.Tensor, expected: torch.Tensor, device: torch.device, whole: bool
    ) -> str | None:
        if (tensor.shape, tensor.dtype, tensor.device) != (expected.shape, expected.dtype, device):
            return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        have, want = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, expected))
        step = PIECE if whole else END
        for at in range(0, have.numel(), step) if whole else (0, max(0, have.numel() - END)):
            there = have[at : at + step]
            if not torch.equal(there, self._beside(there, want[at : at + step])):
                return f"bytes differ, from {at} on"
        return None

    def _beside(self, there: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
        """The expected bytes, on the device where they are compared, in buffers that are used again."""
        if there.device.type == "cpu":
            return want
        if self._buffers is None:
            on_host = torch.empty(PIECE, dtype=torch.uint8, pin_memory=there.device.type == "cuda")
            self._buffers = (on_host, torch.empty(PIECE, dtype=torch.uint8, device=there.device))
        on_host, on_device = (buffer[: want.numel()] for buffer in self._buffers)
        return on_device.copy_(on_host.copy_(want))

    def release(self) -> None:
        """Nothing maps the files any more, so that they can be evicted, nor is the device's memory used."""
        self._opened.clear()
        self._buffers = None
