"""Which tensor of a checkpoint goes where in a target: names, shapes, dtypes, memory, tied weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from weightload import _C
from weightload.dtypes import TORCH_DTYPES, torch_shape
from weightload.errors import StateDictError, TensorError, located
from weightload.plain_torch import plainly

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
Target = torch.nn.Module | Mapping[str, torch.Tensor]


@dataclasses.dataclass
class Match:
    """The outcome of matching."""

    places: dict[str, torch.Tensor]
    """Where each tensor that will be read goes; of tied names, the last."""
    direct: set[str]
    """Names whose bytes can be read straight into that memory."""
    overlapping: list[str]
    """Names that share memory with others, in the target's order: the last written counts."""
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


def tensors_of(target: Target) -> dict[str, torch.Tensor]:
    """Names and tensors to load into; of a module, its parameters and persistent buffers.

    Raises:
        TypeError: neither a module nor a mapping of tensors.
        StateDictError: a tensor without memory: on the meta device, or of a lazy module.
    """
    if isinstance(target, torch.nn.Module):
        found = _own_tensors(target)
    elif isinstance(target, Mapping):
        found = dict(target)
    else:
        raise TypeError(f"cannot load into a {type(target).__name__}: must be a module or a mapping of tensors")
    _require_loadable(found)
    return found


@plainly
def _require_loadable(found: Mapping[str, object]) -> None:
    """Raise what ``tensors_of`` does of tensors."""
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"cannot load into {name!r}, a {type(tensor).__name__}: must be a tensor")
        plain = type(tensor) in PLAIN and tensor.layout is torch.strided
        freed = plain and tensor.nbytes > 0 and tensor.untyped_storage().nbytes() == 0
        if tensor.device.type == "meta" or torch.nn.parameter.is_lazy(tensor) or freed or _is_fake(tensor):
            raise StateDictError(f"{name!r} has no memory to load into; materialise it first, as Module.to_empty does")
        if tensor.layout is not torch.strided and not tensor.is_mkldnn:
            raise StateDictError(f"cannot load into {name!r}: its layout is {tensor.layout}")
        if plain and _repeats(tensor):
            raise StateDictError(f"cannot load into {name!r}: several of its elements are one in memory (expanded)")


def _is_fake(tensor: torch.Tensor) -> bool:
    """Whether it only claims to be on its device, as tensors of FakeTensorMode do."""
    if tensor.layout is not torch.strided or tensor.is_mkldnn:
        return False
    try:
        return tensor.untyped_storage().device.type == "meta"
    except (RuntimeError, NotImplementedError):  # subclasses that have no storage
        return False


def _own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the module's state_dict names, where that is the module's own memory.

    Hooks and overrides may make tensors on the fly: what is written to those is lost.
    """
    own = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) in own:
            found[name] = value
        elif not name.endswith("_extra_state"):  # never in a safetensors file; load_state_dict's alone
            raise StateDictError(f"{name!r} is made by the module's state_dict on the fly; use load_state_dict")
    return found


def match(target: Target, files: Sequence[_C.CheckpointFile], strict: bool) -> Match:
    """Decide where every tensor of the files goes, before any byte of them is read.

    Raises:
        StateDictError: shapes differ, or names do under ``strict``. All differences are named.
        TensorError: torch lacks the dtype of a tensor that is wanted.
    """
    return _match(tensors_of(target), type(target).__name__, files, strict)


@plainly
def _match(tensors: dict[str, torch.Tensor], kind: str, files: Sequence[_C.CheckpointFile], strict: bool) -> Match:
    tied = _tied(tensors)
    here = {
        name: (dtype, shape, path)
        for file in files
        for path in (file.path,)
        for name, dtype, shape, _, _ in file.tensors()
    }
    problems = []
    place: tuple[str | None, str | None] | None = None
    for name, (dtype, shape, path) in here.items():
        if name not in tensors:
            continue
        if dtype not in TORCH_DTYPES:
            raise located(TensorError(f"{path}: torch has no dtype for {dtype}, that of tensor `{name}`"), path, name)
        theirs, ours = torch_shape(dtype, shape), tuple(tensors[name].shape)
        # As load_state_dict: checkpoints of before torch 0.4 have vectors of one element for scalars.
        if theirs != ours and not (ours == () and theirs == (1,)):
            problems.append(f"size mismatch for {name}: the checkpoint has {theirs}, the target {ours}")
            place = place or (path, name)
    alive = {key for name, key in tied.items() if name in here}
    missing = [name for name in tensors if name not in here and tied[name] not in alive]
    unexpected = [name for name in here if name not in tensors]
    if strict and missing:
        problems.append("missing from the checkpoint: " + ", ".join(missing))
    if strict and unexpected:
        problems.append("unexpected in the checkpoint: " + ", ".join(unexpected))
    if problems:
        source = files[0].path if len(files) == 1 else f"{len(files)} files"
        what = f"cannot load {source} into {kind}"
        place = place or (files[0].path if len(files) == 1 else None, None)
        raise located(StateDictError(f"{what}:\n\t" + "\n\t".join(problems)), *place)
    # Of tied names the last in the target's order wins, as with load_state_dict; the others are not read.
    last = {tied[name]: name for name in tensors if name in here}
    places = {name: tensors[name] for name in here if name in tensors and last[tied[name]] == name}
    direct = {name for name, place in places.items() if _is_plain(place) and place.dtype == TORCH_DTYPES[here[name][0]]}
    mixed = _overlapping(places)
    overlapping = [name for name in tensors if name in mixed]
    return Match(places, direct - mixed, overlapping, [name for name in here if name in tensors], missing, unexpected)


def _tied(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """A key for each name, equal for names of the same memory seen in the same way."""
    keys: dict[str, object] = {}
    for name, tensor in tensors.items():
        if _has_storage(tensor):
            keys[name] = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        else:
            keys[name] = id(tensor)
    return keys


def _has_storage(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a strided view of memory with an address; empty ones have none."""
    if tensor.layout is not torch.strided:
        return False
    try:
        return tensor.data_ptr() != 0  # 0: wrappers around other tensors
    except (RuntimeError, NotImplementedError):  # fake tensors
        return False


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether a dimension of more than one element has them all in one place, as expand() makes it."""
    if tensor.is_contiguous():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is its memory: dense, contiguous, nothing lazy about it."""
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _overlapping(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names whose memory may overlap another's: reading both at once would mix them."""
    devices: dict[torch.device, int] = {}
    spans = []
    for name, tensor in tensors.items():
        if not _has_storage(tensor) or tensor.numel() == 0:
            continue
        begin = tensor.data_ptr()
        spans.append((devices.setdefault(tensor.device, len(devices)), begin, begin + _extent(tensor), name))
    spans.sort()
    mixed: set[str] = set()
    furthest = (0, 0, "")
    for device, begin, end, name in spans:
        if device == furthest[0] and begin < furthest[1]:
            mixed |= {name, furthest[2]}
        furthest = max(furthest, (device, end, name))
    return mixed


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
