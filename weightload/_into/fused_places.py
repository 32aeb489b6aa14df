"""The places of the tensors that fill a target's tensor together, each a box of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import torch

from weightload._base.dtypes import torch_shape
from weightload._base.plain_torch import empty
from weightload._base.printable import printable
from weightload._into.places import Place, copies_plainly, look
from weightload._load.renaming import Piece, Renamed
from weightload._parts import boxes
from weightload._parts.shards import NOTHING, Part


@dataclasses.dataclass
class FusedPlaces:
    """``Renamed.pieces`` as places of a target. Names of pieces are those of the renamed files."""

    tensors: dict[str, torch.Tensor]
    """The target's tensors by name, in its order, with the pieces of each in its place."""
    places: dict[str, Place]
    """The place of each piece. It is of memory that nobody has where the box is not in this process."""
    bounds: dict[str, boxes.Bounds]
    """The boxes of those that have no problem."""
    owners: dict[str, str]
    """The tensor of the target that each piece is of, also of those that it lacks."""
    problems: list[tuple[str, str]]
    """Pieces and what is wrong with them."""
    partly: dict[str, str]
    """Tensors of the target of which something stays as it is, and what, in words."""

    def name(self, tensor: str) -> str:
        """The target's name of a tensor of the files."""
        return self.owners.get(tensor, tensor)

    def names(self, tensors: Iterable[str]) -> dict[str, None]:
        """The target's names of tensors of the files."""
        return dict.fromkeys(map(self.name, tensors))

    def filled(self) -> list[str]:
        """Tensors of the target of which all is filled."""
        return [name for name in dict.fromkeys(self.owners.values()) if name not in self.partly]

    def whole(self, tensors: Collection[str], places: Mapping[str, Place]) -> dict[str, Place]:
        """The places of tensors of the files, and in those of pieces the one of their tensor: pieces do not overlap
        each other, though columns of a matrix begin and end among each other."""
        return {name: places[name] for name in self.names(tensors)}

    def keys(self, tied: Mapping[str, object], places: Mapping[str, Place]) -> dict[str, object]:
        """Keys of pieces of shards, equal for tied ones on all ranks: also where a rank has nothing of them."""
        return {
            name: (tied[self.owners[name]], bounds)
            for name, bounds in self.bounds.items()
            if places[self.owners[name]].whole is not None
        }

    def elsewhere(self, places: Mapping[str, Place]) -> list[str]:
        """The pieces of shards of which nothing is on this rank."""
        return [
            name for name in self.bounds if places[self.owners[name]].whole is not None and places[name].whole is None
        ]

    def pieces(self, tensors: Iterable[str]) -> dict[str, list[str]]:
        """Which of these tensors of the files are pieces, by the target's name."""
        found: dict[str, list[str]] = {}
        for name in tensors:
            if name in self.owners:
                found.setdefault(self.owners[name], []).append(name)
        return found


@torch.no_grad()  # with autograd, the view of each box would be a node of the graph
def fuse(
    renamed: Renamed,
    here: Mapping[str, tuple[str, str, tuple[int, ...], int, int]],
    tensors: Mapping[str, torch.Tensor],
    places: Mapping[str, Place],
) -> FusedPlaces:
    """Find the places of pieces.

    Args:
        renamed: what was renamed.
        here: of each tensor of the renamed files its name, dtype, shape, and where its bytes begin and end.
        tensors, places: of the target.
    """
    owners = {name: renamed.pieces[name].target for name in here if name in renamed.pieces}
    found = FusedPlaces({}, {}, {}, owners, [], {})
    pieces = found.pieces(here)
    taken = "cannot be loaded: the target has a tensor of this name, which stands for a box of another"
    found.problems += [(name, f"{name!r} {taken}") for name in owners if name in tensors]
    for name, tensor in tensors.items():
        if name not in pieces:
            found.tensors[name] = tensor
            continue
        found.tensors.update(dict.fromkeys(pieces[name], tensor))
        found.places.update(dict.fromkeys(pieces[name], places[name]._replace(part=NOTHING, problem=None)))
        if words := _uncuttable(tensor, places[name]):
            found.problems += [(piece, f"{piece!r} {words}") for piece in pieces[name]]
        elif not places[name].problem:
            shapes = {piece: torch_shape(here[piece][1], here[piece][2]) for piece in pieces[name]}
            _lay(name, {piece: renamed.pieces[piece] for piece in shapes}, shapes, tensor, places[name], found)
    return found


def _uncuttable(tensor: torch.Tensor, place: Place) -> str | None:
    if torch.nn.parameter.is_lazy(tensor) or place.problem:
        return None  # which is said of it
    memory = place.tensor
    if not copies_plainly(type(memory)) or memory.layout is not torch.strided or memory.is_quantized:
        return f"cannot be loaded into: no box can be cut of a {type(memory).__name__} ({memory.layout})"
    return None


def _lay(
    name: str,
    pieces: Mapping[str, Piece],
    shapes: Mapping[str, tuple[int, ...]],
    tensor: torch.Tensor,
    place: Place,
    found: FusedPlaces,
) -> None:
    """The places of the pieces of one tensor, or what is wrong with them."""
    shape = tuple(tensor.shape)
    part: Part = tuple(((0, size),) for size in shape) if place.part is None else place.part
    laid: dict[str, boxes.Bounds] = {}
    for piece, (_, box) in pieces.items():
        try:
            laid[piece] = bounds = boxes.bounds_in(box, shape)
        except boxes.NoBoxError as error:
            found.problems.append((piece, f"{printable(piece)}: {error}"))
            continue
        theirs, ours = shapes[piece], boxes.shape_of_box(box, bounds)
        if theirs != ours and not (ours == () and theirs == (1,)):
            words = f"the checkpoint has {theirs}, the box {boxes.in_words(bounds)} of the target {ours}"
            found.problems.append((piece, f"size mismatch for {printable(piece)}: {words}"))
        else:
            found.places[piece] = _place(box, bounds, part, place)
            found.bounds[piece] = bounds
    if len(laid) < len(pieces):
        return
    gap, clash = boxes.tiling(tuple(laid.values()), shape)
    if clash:
        names = [list(laid)[number] for number in clash]
        both = " and ".join(f"{printable(piece)} {boxes.in_words(laid[piece])}" for piece in names)
        found.problems.append((names[0], f"boxes of {printable(name)} overlap: {both}"))
    elif gap:
        words = f"only a part of {printable(name)} is in the checkpoint"
        found.partly[name] = f"{words}: nothing fills {boxes.in_words(gap)}"


def _place(box: boxes.Box, bounds: boxes.Bounds, part: Part, place: Place) -> Place:
    index, mine = boxes.index_in_part(box, bounds, part)
    if mine is not NOTHING:
        return look(place.tensor[index], {})._replace(part=mine, whole=place.whole)
    # All ranks of a group load the same tensors, even if nothing of them. A single element has no empty part.
    dimensions = len(boxes.shape_of_box(box, bounds))
    scratch = empty((0,) * dimensions, place.tensor.dtype, place.tensor.device)
    return look(scratch, {})._replace(part=((),) * dimensions or None)
