"""What a load must give: every tensor of the files, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

SAMPLE = 50
PIECE = 4 << 20
END = 64 << 10


class Checkpoint:
    """The CPU tensors of the files, as safetensors maps them, and a sample of their names."""

    def __init__(self, files: list[str]) -> None:
        from safetensors import safe_open

        self.file_of: dict[str, str] = {}
        self._opened: dict[str, Any] = {}
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
        """What is wrong with these tensors; not ``whole``: their two ends are compared."""
        for name, tensor in tensors.items():
            wrong = _difference(tensor, self._expected(name), device, whole)
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

    def release(self) -> None:
        """Nothing maps the files any more, so that they can be evicted."""
        self._opened.clear()


def _difference(tensor: torch.Tensor, expected: torch.Tensor, device: torch.device, whole: bool) -> str | None:
    if (tensor.shape, tensor.dtype, tensor.device) != (expected.shape, expected.dtype, device):
        return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    have, want = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, expected))
    step = PIECE if whole else END
    for at in range(0, have.numel(), step) if whole else (0, max(0, have.numel() - END)):
        if not torch.equal(have[at : at + step], want[at : at + step].to(device)):
            return f"bytes differ, from {at} on"
    return None
