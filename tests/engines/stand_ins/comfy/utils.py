"""``load_torch_file`` as far as weightload is concerned, written from what ComfyUI's calls and looks for in errors."""

from typing import Any

import safetensors.torch
import torch

DISABLE_MMAP = False
annotated: list[str] = []


def load_torch_file(
    ckpt: str, safe_load: bool = False, device: torch.device | None = None, return_metadata: bool = False
) -> Any:
    """The tensors of a file, and its metadata if they are asked for."""
    device = device or torch.device("cpu")
    metadata = None
    if not ckpt.lower().endswith((".safetensors", ".sft")):
        weights = torch.load(ckpt, map_location=device, weights_only=True)
    else:
        try:
            with safetensors.safe_open(ckpt, framework="pt", device=device.type) as handle:
                weights = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                metadata = handle.metadata()
        except Exception as failed:
            if failed.args and "HeaderTooLarge" in failed.args[0]:
                raise ValueError(f"{ckpt} is no safetensors file") from failed
            if failed.args and "MetadataIncompleteBuffer" in failed.args[0]:
                raise ValueError(f"{ckpt} is incomplete") from failed
            raise
    annotated.append(ckpt)
    return (weights, metadata) if return_metadata else weights
