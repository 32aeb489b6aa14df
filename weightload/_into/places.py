"""How a tensor of a target can be filled: read into, copied into, or not at all, and what says so before any byte."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch

from weightload import _C
from weightload._base.handlers import pass_on
from weightload._base.plain_torch import empty, zeros
from weightload._parts.shards import Dealt, Known, NotAShardError, Part, is_dtensor, shard_of

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
NO_MEMORY = "has no memory to load into; materialise it first, as Module.to_empty does"
LAZY = (
    "has no memory to load into and no shape yet, as its module is lazy; call the module once before, or load with "
    "load_state_dict, which takes shapes from the checkpoint"
)
READ_ONLY = "cannot be loaded into: its memory is read-only, as that of a file that was mapped to be read"
MAPS = "/proc/self/maps"
READ_ONLY_RANGE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .-", re.MULTILINE)


class Place(NamedTuple):
    """Facts about a tensor of the target."""

    tensor: torch.Tensor
    direct: bool
    """Whether it is its memory, dense and contiguous: bytes of its dtype can be read straight into it."""
    problem: str | None
    """Why it cannot be filled, to be said after its name. Of a DTensor all this is of its memory on this rank."""
    begin: int
    """The address of its first byte; 0 without any in memory."""
    end: int
    """The address of the end of its last byte."""
    part: Part | None = None
    """Which part of the file's tensor it takes; None: all of it."""
    whole: torch.Tensor | None = None
    """The DTensor that it is the memory of."""
    dealt: Dealt | None = None
    """How that is dealt out."""

    def hopeless(self) -> bool:
        """Whether nobody can fill it, not even a module of its own."""
        return self.problem in (NO_MEMORY, LAZY)

    def key(self) -> object:
        """Equal for tensors that are the same memory seen in the same way: tied weights."""
        tensor = self.tensor
        if not self.begin:
            return (id(tensor),) if self.whole is None else _key_of_empty_shard(tensor, self.whole)
        return tensor.device, self.begin, self.end, tensor.dtype, tensor.shape, tensor.stride(), self.part


def _key_of_empty_shard(local: torch.Tensor, whole: torch.Tensor) -> object:
    """Ranks must agree on what is tied: a shard without elements may have memory for padding behind it."""
    storage = local.untyped_storage()
    if not storage.nbytes():
        return (id(whole),)
    return storage.data_ptr(), local.storage_offset(), local.dtype, whole.shape


def keys(places: Mapping[str, Place]) -> dict[str, object]:
    """A key for every name, equal for tied tensors."""
    # Make few objects: there may be tens of thousands of tensors, and the garbage collector looks at all.
    first: dict[int, str] = {}
    several = {0}
    for name, place in places.items():
        if first.setdefault(place.begin, name) is not name:
            several.add(place.begin)
    return {name: place.key() if place.begin in several else place.begin for name, place in places.items()}


def look(tensor: torch.Tensor, known: Known) -> Place:
    """Decide how a tensor is filled. Whatever is neither read into nor refused is given to its ``copy_``.

    Whether that knows the file's dtype is asked of ``CopyTrials``. ``known``: one for all tensors of a target.
    """
    plain = type(tensor) in PLAIN
    if not plain and is_dtensor(tensor):
        return _look_at_shard(tensor, known)
    if plain:
        memory = _C.dense_memory(tensor)
        if memory is not None:
            return Place(tensor, True, None, *memory)
    elif problem := _problem_of_kind(tensor):
        return Place(tensor, False, problem, 0, 0)
    if tensor.is_meta:
        return Place(tensor, False, NO_MEMORY, 0, 0)
    if tensor.is_nested:
        return Place(tensor, False, "cannot be loaded into: it is a nested tensor", 0, 0)
    if tensor.layout is not torch.strided:
        # Tensors of other libraries' layouts are asked whether they can be copied into.
        problem = None if tensor.is_mkldnn else f"cannot be loaded into: its layout is {tensor.layout}"
        return Place(tensor, False, problem, 0, 0)
    contiguous = tensor.is_contiguous()
    extent = tensor.nbytes if contiguous else _extent(tensor)
    address = _address(tensor)
    problem = None
    if plain:
        if not contiguous and _repeats(tensor):
            problem = "cannot be loaded into: several of its elements are one in memory (expanded)"
        elif extent:
            held = tensor.untyped_storage().nbytes()
            if held == 0:
                problem = NO_MEMORY
            elif address == 0:
                problem = "cannot be loaded into: its zeros are not in memory"
            elif held < tensor.storage_offset() * tensor.itemsize + extent:
                problem = f"cannot be loaded into: its storage of {held} bytes ends before its last element"
    direct = plain and contiguous and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    if not address or not extent:
        address = extent = 0
    return Place(tensor, direct, problem, address, address + extent)


def _problem_of_kind(tensor: torch.Tensor) -> str | None:
    if torch.nn.parameter.is_lazy(tensor):
        return LAZY
    if _is_fake(tensor):
        return NO_MEMORY
    return None


def _look_at_shard(whole: torch.Tensor, known: Known) -> Place:
    try:
        local, dealt = shard_of(whole, known)
    except NotAShardError as failed:
        return Place(whole, False, f"cannot be loaded into: it is a DTensor, and {failed}", 0, 0)
    part = None if dealt.is_all else dealt.part
    memory = _C.dense_memory(local) if type(local) in PLAIN else None
    if memory is not None:
        return Place(local, True, None, *memory, part, whole, dealt)
    _, direct, problem, begin, end, *_ = look(local, known)
    return Place(local, direct, problem, begin, end, part, whole, dealt)


def _is_fake(tensor: torch.Tensor) -> bool:
    """Whether it only claims to be on its device, as tensors of FakeTensorMode do."""
    if tensor.layout is not torch.strided or tensor.is_mkldnn:
        return False
    try:
        return tensor.untyped_storage().device.type == "meta"
    except (RuntimeError, NotImplementedError) as failed:  # subclasses that have no storage
        pass_on(failed)
        return False


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()  # 0: wrappers around other tensors
    except (RuntimeError, NotImplementedError) as failed:  # fake tensors
        pass_on(failed)
        return 0


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether a dimension of more than one element has them all in one place, as expand() makes it."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class Spans:
    """The memory of many tensors, by address."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._devices: dict[torch.device, list[tuple[str, Place]]] = {}
        for item in places.items():
            if item[1].begin:
                self._devices.setdefault(item[1].tensor.device, []).append(item)
        for spans in self._devices.values():
            spans.sort(key=_begin)

    def overlapping(self) -> set[str]:
        """Names whose memory may overlap another's: reading both at once would mix them."""
        mixed: set[str] = set()
        for spans in self._devices.values():
            furthest, end = "", 0
            for name, place in spans:
                if place.begin < end:
                    mixed |= {name, furthest}
                if place.end > end:
                    furthest, end = name, place.end
        return mixed

    def read_only(self) -> list[str]:
        """Names with CPU memory that cannot be written: views of a file mapped to be read, say.

        A read into it fails, and a copy ends the process. Where the system does not say, none.
        """
        mine = self._devices.get(torch.device("cpu"))
        if not mine:
            return []
        try:
            with open(MAPS, "rb") as maps:
                text = maps.read()
        except OSError as failed:
            pass_on(failed)
            return []
        begins = [place.begin for _, place in mine]
        ends = list(itertools.accumulate((place.end for _, place in mine), max))
        found = []
        for region in READ_ONLY_RANGE.finditer(text):
            low, high = int(region[1], 16), int(region[2], 16)
            before = bisect.bisect_left(begins, high)  # that many begin below its end
            if before and ends[before - 1] > low:
                found += [name for name, place in mine[:before] if place.end > low]
        return list(dict.fromkeys(found))


def _begin(item: tuple[str, Place]) -> int:
    return item[1].begin


class CopyTrials:
    """Whether ``copy_`` can fill tensors from a file's dtype: tried on a tensor of the same kind that nobody needs."""

    def __init__(self) -> None:
        self._known: dict[object, str | None] = {}
        self.untried: list[str] = []
        """Names of tensors of which no other of their kind could be made."""

    def problem(self, name: str, place: Place, dtype: torch.dtype) -> str | None:
        """Why it cannot, to be said after the tensor's name."""
        tensor = place.tensor
        if copies_plainly(type(tensor)) and tensor.layout is torch.strided and not tensor.is_quantized:
            words = _cast_problem(tensor.dtype, dtype, tensor.device.type)
        else:
            key = (type(tensor), tensor.layout, tensor.is_quantized, tensor.dtype, dtype, tensor.device)
            if key not in self._known:
                self._known[key] = self._try(tensor, dtype)
            words = self._known[key]
        if words == "untried":
            self.untried.append(name)
            return None
        return words

    @staticmethod
    def _try(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                twin = tensor.detach().clone()
            except Exception as failed:
                pass_on(failed)
                return "untried"
            if type(twin) is not type(tensor) and not copies_plainly(type(tensor)):
                return "untried"
            try:
                twin.copy_(zeros(tensor.shape, dtype, tensor.device))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                pass_on(error)
                what = f"a {type(tensor).__name__} of {tensor.dtype}"
                return f"cannot be loaded into: {what} does not take {dtype}: {_first_line(error)}"
        return None


def copies_plainly(kind: type[torch.Tensor]) -> bool:
    """Whether ``copy_`` of this class of tensors is that of torch.Tensor, as of parameters that carry attributes."""
    if kind in PLAIN:
        return True
    same = ("__torch_dispatch__", "copy_")
    function: object = kind.__torch_function__
    default = torch.Tensor.__torch_function__.__func__, torch.nn.Parameter.__torch_function__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function) in default and all(
        getattr(kind, name) is getattr(torch.Tensor, name) for name in same
    )


@functools.cache
def _cast_problem(to: torch.dtype, dtype: torch.dtype, device: str) -> str | None:
    """Why ``copy_`` cannot fill plain tensors from this dtype, whatever their strides; None if it can."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place, source = (empty((2, 2), of, torch.device(device)) for of in (to, dtype))
        try:
            place.t().copy_(source)
            place.copy_(source)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            pass_on(error)
            return f"cannot be loaded into: {to} cannot be made of {dtype}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
