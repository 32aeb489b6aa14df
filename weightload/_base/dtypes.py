"""safetensors' dtypes and torch's."""

from __future__ import annotations

import torch

# The dtypes of safetensors 0.8 that torch has.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

PACK = {"F4": 2}
"""Elements that torch's type holds, of dtypes that are packed: the last dimension of a tensor counts those in torch."""


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a file's tensor as torch counts it."""
    return (*shape[:-1], shape[-1] // PACK[dtype]) if dtype in PACK and shape else shape
