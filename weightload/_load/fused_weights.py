"""An iterator's ``rename=``: tensors under new names, and several of them as one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from weightload import _C
from weightload._base.dtypes import TORCH_DTYPES, torch_shape
from weightload._base.plain_torch import empty, plainly
from weightload._base.printable import printable
from weightload._base.uncopied import Load, StandsForALoad
from weightload._checkpoint.selection import Names, Opening, predicate, select_all
from weightload._load import devices
from weightload._load.renaming import Rename, Renamed, ask, rename_files
from weightload._parts import boxes
from weightload._parts.chosen_parts import Shard
from weightload.errors import DeviceOutOfMemoryError, OutOfMemoryError, TensorError, located


@dataclasses.dataclass
class FusedTensor:
    """A tensor that is made of several of the files."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    left: int
    """How many pieces are still to come."""
    tensor: torch.Tensor | None = None
    """There as soon as there is a piece of it, or before."""
    stream: torch.Stream | None = None
    """The stream that the last piece was copied on."""

    def make(self, device: torch.device) -> torch.Tensor:
        """Its memory.

        Raises:
            OutOfMemoryError: there is none.
        """
        try:
            return empty(self.shape, self.dtype, device)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate" not in str(error):
                raise
            kind = OutOfMemoryError if device.type == "cpu" else DeviceOutOfMemoryError
            words = f"no memory for tensor `{printable(self.name)}`, of {self.shape}: {error}"
            raise located(kind(words), None, self.name) from error


Index = tuple[int | slice, ...]
Weights = TypeVar("Weights", bound=Load)


class RenamedLoad:
    """The files of an iterator with ``rename=``.

    Attributes:
        places: for a load to the CPU: where to read each tensor, or None. There once the files are open.
        shard: to be asked in place of the caller's, by the new names; None if that is None.
    """

    def __init__(
        self,
        open_them: Opening,
        rename: Rename,
        names: Names | None,
        duplicates: str,
        shard: Shard | None,
        device: torch.device,
    ) -> None:
        self._open, self._rename, self._names, self._duplicates = open_them, rename, names, duplicates
        self._device = device
        self._pieces: dict[str, tuple[FusedTensor, Index]] = {}
        self.places: list[torch.Tensor | None] = []
        self.shard = self._asking(shard) if shard is not None else None
        self._sources: Mapping[str, str] = {}

    def _asking(self, shard: Shard) -> Shard:
        return lambda name, shape, dtype: shard(self._sources.get(name, name), shape, dtype)

    def open(self) -> list[_C.CheckpointFile]:
        """The files, with the tensors that are wanted of them only, by their new names.

        Raises:
            TypeError, ValueError: ``rename=`` said what makes no sense, or boxes that do not tile their tensor.
            DuplicateTensor: two tensors have one name, before or after.
        """
        files = self._open()
        try:
            picked = predicate(self._names) if self._names is not None else None
            names = dict.fromkeys(name for file in files for name in file.names())
            answers = ask(self._rename, names if picked is None else filter(picked, names))
            selection = select_all(files, lambda name: answers.get(name) is not None, self._duplicates)
            renamed = rename_files(files, selection, answers)
            self._sources = renamed.sources
            if renamed.pieces:
                if self.shard is not None:
                    raise ValueError("shard= asks for parts of tensors, of which rename= can make no boxes of others")
                self._fuse(renamed, [tensor for file in files for tensor in file.tensors()])
        except BaseException:
            files.clear()  # an exception's traceback would keep them open
            raise
        return files

    def _fuse(self, renamed: Renamed, tensors: list[tuple[Any, ...]]) -> None:
        dtypes: dict[str, str] = {}  # of each tensor that is made
        laid: dict[str, dict[str, boxes.Bounds]] = {}
        for name, dtype, shape, _, _ in tensors:
            piece = renamed.pieces.get(name)
            if piece is None:
                continue
            if dtype not in TORCH_DTYPES:
                words = f"torch has no dtype for {dtype}, that of tensor `{printable(name)}`"
                raise located(TensorError(words), None, name)
            if dtypes.setdefault(piece.target, dtype) != dtype:
                kinds = f"{dtypes[piece.target]} and {dtype}"
                raise ValueError(f"{printable(name)}: the boxes of a tensor must have one dtype, not {kinds}")
            try:
                bounds = boxes.bounds_around(piece.box, torch_shape(dtype, shape))
            except boxes.NoBoxError as error:
                raise ValueError(f"{printable(name)}: {error}") from error
            laid.setdefault(piece.target, {})[name] = bounds
        for target, here in laid.items():
            made = FusedTensor(target, _shape_of(target, here), TORCH_DTYPES[dtypes[target]], len(here))
            for name, bounds in here.items():
                self._pieces[name] = made, boxes.index_of(renamed.pieces[name].box, bounds)
        if self._device.type == "cpu":
            self.places += _places([name for name, *_ in tensors], self._pieces)

    def fuse(self, weights: Weights) -> Weights | FusedWeights:
        """The load, which has begun, of what is yielded; the same if no tensor is made of others."""
        self.places.clear()  # the load has them
        return FusedWeights(weights, self._pieces) if self._pieces else weights


def _shape_of(name: str, pieces: Mapping[str, boxes.Bounds]) -> tuple[int, ...]:
    """The shape that boxes fill together.

    Raises:
        ValueError: they leave gaps, or overlap.
    """
    first = next(iter(pieces))
    for piece, bounds in pieces.items():
        if len(bounds) != len(pieces[first]):
            counts = f"{len(pieces[first])} and {len(bounds)}"
            raise ValueError(f"{printable(first)} and {printable(piece)}: boxes of {counts} dimensions")
    shape = tuple(max(end for _, end in spans) for spans in zip(*pieces.values(), strict=True))
    gap, clash = boxes.tiling(tuple(pieces.values()), shape)
    if clash:
        names = [list(pieces)[number] for number in clash]
        both = " and ".join(f"{printable(piece)} {boxes.in_words(pieces[piece])}" for piece in names)
        raise ValueError(f"boxes of {printable(name)} overlap: {both}")
    if gap:
        raise ValueError(f"only a part of {printable(name)} is loaded: nothing fills {boxes.in_words(gap)} of {shape}")
    return shape


@plainly
def _places(names: list[str], pieces: Mapping[str, tuple[FusedTensor, Index]]) -> list[torch.Tensor | None]:
    """Where these tensors can be read right into the ones that they are pieces of."""
    found: list[torch.Tensor | None] = []
    for name in names:
        place = None
        if name in pieces:
            made, index = pieces[name]
            if made.tensor is None:
                # Memory that nobody has touched costs nothing.
                made.tensor = made.make(devices.CPU)
            view = made.tensor[index]
            place = view if view.is_contiguous() else None
        found.append(place)
    return found


@plainly
def _put(piece: torch.Tensor, made: FusedTensor, index: Index) -> None:
    """Copy a piece into its box, on the stream that is current."""
    if made.tensor is None:
        made.tensor = made.make(piece.device)
    whole = made.tensor
    if whole.itemsize == 1:  # torch copies no packed elements
        whole, piece = whole.view(torch.uint8), piece.view(torch.uint8)
    if piece.device.type != "cpu":
        _follow(made, torch.accelerator.current_stream(piece.device))
    with torch.no_grad():
        whole[index].copy_(piece)


def _follow(made: FusedTensor, stream: torch.Stream) -> None:
    """Have what comes on a stream wait for the copies before, which may have been on another."""
    if made.stream is not None and made.stream != stream and made.tensor is not None:
        stream.wait_stream(made.stream)
        made.tensor.record_stream(stream)
    made.stream = stream


class FusedWeights(StandsForALoad):
    """A load's items, but for those that are pieces of one tensor: that comes once, in the place of its last piece.

    Otherwise as the load itself.
    """

    def __init__(self, weights: Load, pieces: dict[str, tuple[FusedTensor, Index]]) -> None:
        super().__init__(weights)
        self._pieces = pieces
        self._lock = threading.RLock()  # several threads may take from a load
        self._closed = False
        tensors = {id(made): made for made, _ in pieces.values()}
        self._count = len(weights) - len(pieces) + len(tensors)

    def __next__(self) -> tuple[str, torch.Tensor]:
        while True:
            name, tensor = next(self._weights)
            if name not in self._pieces:
                return name, tensor
            try:
                with self._lock:
                    if self._closed:
                        raise StopIteration
                    made, index = self._pieces.pop(name)
                    if tensor is not None:  # else it was read there
                        _put(tensor, made, index)
                    made.left -= 1
                    if made.left == 0 and made.tensor is not None and not self._closed:
                        whole, made.tensor = made.tensor, None
                        return made.name, whole
            except BaseException:
                self.close()
                raise

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Stop the load, also one that another thread waits in."""
        super().close()
        with self._lock:
            self._closed = True  # what is not whole by now is not handed out any more
            for made, _ in self._pieces.values():
                made.tensor = None
