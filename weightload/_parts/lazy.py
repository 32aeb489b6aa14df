"""Tensors that are read when somebody looks at them, and of which no more is read than what was narrowed to.

For loaders that are given whole tensors and narrow them to what they want: nothing has to be known of the loader. What
is neither a question about the shape, nor a view, nor a copy is done with the whole tensor, in memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from weightload._parts.boxes import Bounds, index_in_part
from weightload._parts.shards import Part

Read = Callable[[tuple[slice, ...]], torch.Tensor]
"""Reads a box of a tensor of a file, into memory of its own or that of a mapping."""

# Functions and attributes of torch, by their names: what the dispatcher answers without looking at memory,
QUESTIONS = frozenset({
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "dtype", "itemsize", "element_size",
    "nbytes", "is_floating_point", "is_complex", "is_signed", "device", "get_device", "is_cpu", "is_cuda", "is_meta",
    "is_xpu", "layout", "is_sparse", "is_quantized", "is_nested", "is_contiguous", "stride", "is_leaf", "is_inference",
    "requires_grad", "grad", "grad_fn",
})  # fmt: skip
# what gives a view by slices, indices and the order of dimensions,
VIEWS = frozenset({
    "narrow", "__getitem__", "select", "unbind", "split", "split_with_sizes", "chunk", "tensor_split", "t", "T", "mT",
    "transpose", "swapaxes", "permute", "movedim", "unsqueeze", "detach", "data",
})  # fmt: skip
# and what copies to other memory.
COPIES = frozenset({
    "copy_", "to", "cpu", "cuda", "contiguous", "clone", "float", "half", "bfloat16", "double", "cat", "concat",
    "stack", "add", "sub", "mul", "div", "abs", "repeat", "repeat_interleave", "index_select", "item", "equal", "isnan",
    "empty_like", "zeros_like",
})  # fmt: skip

_aten = torch.ops.aten
_META = torch.device("meta")


class Unread:
    """A tensor of a file, which all views of one ``LazyTensor`` share.

    Args:
        shape, dtype, device: what the tensor would have.
        read: for what is not there yet.
        ahead: a part of the tensor that has been read, and its memory.
        asked: takes the boxes that somebody looks at.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        read: Read,
        ahead: tuple[Part, torch.Tensor] | None = None,
        asked: list[Bounds] | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._asked = [] if asked is None else asked
        self._read = read
        self._ahead = ahead
        self._whole: torch.Tensor | None = None
        self._making = threading.Lock()  # two would be two memories, and what is written to one of them be lost

    def box(self, box: Bounds) -> torch.Tensor:
        """The elements of a box."""
        if all(begin < end for begin, end in box):
            self._asked.append(box)
        slices = tuple(slice(begin, end) for begin, end in box)
        if self._whole is not None:
            return self._whole[slices]
        if self._ahead is not None:
            part, memory = self._ahead
            index, missing = index_in_part(box, box, part)
            if missing is None:
                return memory[index]
        return self._read(slices)

    def make_whole(self) -> None:
        """Read all of it. From now on every box is of the same memory, as those of a tensor are."""
        with self._making:
            if self._whole is None:
                self._whole = self.box(tuple((0, size) for size in self.shape))


class LazyTensor(torch.Tensor):
    """A tensor of a file, or a view of one by slices, indices and the order of its dimensions.

    ``box``: where it lies in the file's tensor. ``order``: of each dimension, which one of the file's it is, or
    ``NEW``; those that are missing have one index in the box.
    """

    _unread: Unread
    _box: Bounds
    _order: tuple[int, ...]

    @staticmethod
    def __new__(cls, unread: Unread, box: Bounds | None = None, order: Sequence[int] | None = None) -> LazyTensor:
        box = tuple((0, size) for size in unread.shape) if box is None else box
        order = tuple(range(len(box))) if order is None else tuple(order)
        lengths = [1 if at == NEW else box[at][1] - box[at][0] for at in order]
        # To torch's inner parts it is on the meta device, as its fake tensors are: so they refuse to make it the memory
        # of another tensor (``parameter.data = lazy``), which would have none.
        with torch.inference_mode(False):  # else it is refused as a view of one that was made before
            made: LazyTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                lengths,
                strides=_strides(unread.shape, order, lengths),
                dtype=unread.dtype,
                device=_META,
                dispatch_device=True,
                requires_grad=False,
            )
        made._unread, made._box, made._order = unread, box, order
        return made

    def read(self) -> torch.Tensor:
        """The tensor that this stands for."""
        kept = sorted(at for at in self._order if at != NEW)
        with torch.inference_mode(False):
            memory = self._unread.box(self._box)
            memory = memory[tuple(slice(None) if at in kept else 0 for at in range(len(self._box)))]
            memory = memory.permute([kept.index(at) for at in self._order if at != NEW])
            return memory[tuple(None if at == NEW else slice(None) for at in self._order)]

    def read_whole(self) -> torch.Tensor:
        """Return the tensor that this stands for as a view of the whole one. Other views see what is written to it."""
        self._unread.make_whole()
        return self.read()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name == "__get__":
            name = function.__self__.__name__
        elif name in ("__set__", "__delete__"):
            raise RuntimeError(f"{function.__self__.__name__} of a tensor that is read in parts cannot be set")
        if name == "contiguous":
            # One that is so already is itself, to whom it is written to; of another one the chunks are not read apart.
            seen = _whole if arguments[0].is_contiguous() else _plain
            return function(*tree_map(seen, arguments), **(options or {}))
        if name in QUESTIONS or name in VIEWS or name in COPIES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*arguments, **(options or {}))
        # Some of these look at memory without asking the dispatcher: nobody knows all their names.
        return function(*tree_map(_whole, arguments), **tree_map(_whole, options or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Do as the dispatcher would with memory."""
        options = options or {}
        if function in _ANSWERS:
            return _ANSWERS[function](*arguments)
        if function in _TO_VIEW and isinstance(arguments[0], LazyTensor):
            found = _TO_VIEW[function](*arguments, **options)
            if found is not None:
                return found
        # Those that torch makes of others by itself, but not in inference mode.
        elif function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            made = function.decompose(*arguments, **options)
            if made is not NotImplemented:
                return made
        schema = function._schema
        if any(returned.alias_info is not None and not returned.alias_info.is_write for returned in schema.returns):
            with torch.inference_mode(False):
                return function(*tree_map(_whole, arguments), **tree_map(_whole, options))
        written = {
            named.name for named in schema.arguments if named.alias_info is not None and named.alias_info.is_write
        }
        places = [named.name for named in schema.arguments]
        given = {**dict(zip(places, arguments, strict=False)), **options}
        taken = {name: tree_map(_whole if name in written else _plain, value) for name, value in given.items()}
        return function(*(taken[name] for name in places[: len(arguments)]), **{name: taken[name] for name in options})


NEW = -1
"""A dimension of one index that is none of the file's."""


def _strides(shape: Sequence[int], order: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Strides of a view of a contiguous tensor, as torch counts them."""
    found: list[int] = []
    for number in reversed(range(len(order))):
        if order[number] != NEW:
            found.append(math.prod(max(size, 1) for size in shape[order[number] + 1 :]))
        else:
            found.append(found[-1] * lengths[number + 1] if found else 1)
    return found[::-1]


def _plain(value: Any) -> Any:
    return value.read() if isinstance(value, LazyTensor) else value


def _whole(value: Any) -> Any:
    return value.read_whole() if isinstance(value, LazyTensor) else value


def _slice(
    tensor: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyTensor | None:
    at = tensor._order[dim]
    begin, stop, _ = slice(start, end).indices(tensor.shape[dim])
    if step != 1 or (at == NEW and (begin, stop) != (0, 1)):
        return None
    if at == NEW:
        return LazyTensor(tensor._unread, tensor._box, tensor._order)
    first = tensor._box[at][0]
    box = (*tensor._box[:at], (first + begin, first + max(begin, stop)), *tensor._box[at + 1 :])
    return LazyTensor(tensor._unread, box, tensor._order)


def _select(tensor: LazyTensor, dim: int, index: int) -> LazyTensor | None:
    length = tensor.shape[dim]
    if not -length <= index < length:
        return None  # torch's to refuse
    dim, index = dim % tensor.dim(), index % length
    one = _slice(tensor, dim, index, index + 1)
    return None if one is None else LazyTensor(one._unread, one._box, one._order[:dim] + one._order[dim + 1 :])


def _permute(tensor: LazyTensor, dims: Sequence[int]) -> LazyTensor | None:
    if sorted(dim % max(tensor.dim(), 1) for dim in dims) != list(range(tensor.dim())):
        return None
    return LazyTensor(tensor._unread, tensor._box, [tensor._order[dim] for dim in dims])


def _transpose(tensor: LazyTensor, dim0: int, dim1: int) -> LazyTensor | None:
    if tensor.dim() == 0:
        return None
    order = list(tensor._order)
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return LazyTensor(tensor._unread, tensor._box, order)


def _unsqueeze(tensor: LazyTensor, dim: int) -> LazyTensor | None:
    if not -tensor.dim() - 1 <= dim <= tensor.dim():
        return None
    dim %= tensor.dim() + 1
    return LazyTensor(tensor._unread, tensor._box, [*tensor._order[:dim], NEW, *tensor._order[dim:]])


def _split(tensor: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor | None] | None:
    length = tensor.shape[dim]
    return [_slice(tensor, dim, at, at + size) for at in range(0, length, size)] if size > 0 and length else None


def _split_sizes(tensor: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor | None] | None:
    if sum(sizes) != tensor.shape[dim] or min(sizes, default=0) < 0:
        return None  # torch's to refuse
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    found = [_slice(tensor, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return None if any(one is None for one in found) else found


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor | None]:
    return [_select(tensor, dim, number) for number in range(tensor.shape[dim])]


def _same(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor._unread, tensor._box, tensor._order)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.prim.device.default: lambda tensor: tensor._unread.device,
    _aten._has_compatible_shallow_copy_type.default: lambda tensor, other: False,
}
_TO_VIEW: dict[Any, Callable[..., Any]] = {
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.t.default: lambda tensor: _transpose(tensor, 0, 1) if tensor.dim() == 2 else None,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_sizes,
    _aten.unbind.int: _unbind,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
}
