"""Which ranks share the reading of a load, and how: groups, nodes, strategies."""

from __future__ import annotations

import os
import re
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from torch.distributed import ProcessGroup

from weightload import _C
from weightload._base.addresses import is_address, name_of
from weightload._base.handlers import pass_on
from weightload._base.paths import Path as PathLike
from weightload._base.plain_torch import plainly
from weightload.errors import GroupError
from weightload.settings import Readers

Strategy = Literal["auto", "independent", "broadcast", "striped"]
STRATEGIES: tuple[str, ...] = ("auto", "independent", "broadcast", "striped")

# Over more nodes the all-gather of stripes, whose ring passes every rank, costs accelerators more than reading on all
# nodes saves: benchmarks/scale/model.py, the least regret over its kinds of storage. A node's only rank has one network
# card's bandwidth.
MOST_STRIPED_NODES, MOST_STRIPED_NODES_OF_ONE_RANK = 128, 16

# How many ranks are on this node: torchrun, Open MPI, MPICH, and Slurm, whose "4(x2),3" names the first nodes first.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE")

# The node groups of the default group they were made in; made again when torch.distributed was.
_node_groups: dict[str, Any] = {}
# Every rank's record before a load begins has this size, so that ranks at different calls are found out. Enough for
# an error's sentence and for what the ranks compare.
RECORD_BYTES = 2048
NODE = b"\2"  # begins the record that names a rank's node, or what else they tell before they agree

# How many nodes the ranks of a group are on, group by group. Not a WeakKeyDictionary: that calls back in Python when a
# group goes, where the exception of a signal handler is lost.
_nodes: list[tuple[weakref.ref[ProcessGroup], int]] = []


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def global_rank() -> int:
    """This process's rank: torch.distributed's, else the launcher's RANK, else 0."""
    if _initialised():
        return torch.distributed.get_rank()
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def auto_strategy(device_type: str, ranks: int, nodes: int = 1, remote: bool = False) -> str:
    """Choose for ``strategy="auto"``, given a group's number of ranks and of nodes; see benchmarks/scale/model.py.

    On the CPU, the ranks of one node share the page cache: every rank maps the files, and nothing needs to travel. On
    accelerators each byte should cross the bus to the devices of a node once. A group over several nodes exists to
    read each byte once for all of them, striped over all disks and network cards until the ring gets too long. What a
    server has (``remote``) is in nobody's page cache: the ranks of a node ask for each byte once, too.
    """
    if ranks == 1 or (device_type == "cpu" and nodes == 1 and not remote):
        return "independent"
    most = MOST_STRIPED_NODES if ranks > nodes else MOST_STRIPED_NODES_OF_ONE_RANK
    return "broadcast" if device_type != "cpu" and nodes > most else "striped"


def node_of_this_process() -> str:
    """A name that the processes of one node share, and no other: the launcher's number, or the machine's."""
    for variable in ("GROUP_RANK", "SLURM_NODEID"):
        if os.environ.get(variable, "").isdigit():
            return f"{variable}={os.environ[variable]}"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as failed:
        pass_on(failed)
        boot = ""
    try:
        name = socket.gethostname()
    except OSError as failed:  # a sandbox without uname
        pass_on(failed)
        name = ""
    return f"{name} {boot}"


def world_is_one_node() -> bool:
    """Whether all ranks are on this node, where that is known without asking them (torchrun says it)."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return torch.distributed.get_world_size() == (int(local) if local.isdigit() else 1)


def ranks_of_this_node() -> int:
    """How many ranks run on this node, by the launcher's word, else all of torch.distributed's, else 1."""
    for variable in LOCAL_SIZES:
        number = re.match(r"\d+", os.environ.get(variable, ""))
        if number:
            return int(number.group())
    return torch.distributed.get_world_size() if _initialised() else 1


def readers_of(shared: bool, apart: bool) -> Readers:
    """Say which processes of this node read the files of a load.

    Args:
        shared: whether ranks share the reading.
        apart: whether each rank of this node reads what no other does.
    """
    if shared or ranks_of_this_node() == 1:
        return "one"
    return "apart" if apart else "same"


def load_name(paths: Sequence[PathLike]) -> str:
    """The name of a load in errors."""
    first = ""
    if paths:
        path = paths[0]  # which may be no path: opening it will say so
        if is_address(path):
            name = name_of(str(path))
        else:
            name = os.path.basename(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else repr(path)
        first = f" (first: {name})"
    return f"load of {len(paths)} file{'s' * (len(paths) != 1)}{first}"


@plainly
def node_group(load: str = "") -> ProcessGroup | None:
    """The ranks of this node, as a group; None where torch.distributed is not initialised.

    That is the default group itself if all its ranks are on one node. Otherwise a group for each node is made, the
    first time: **a collective call, which all ranks of the default group must make.** Loads without ``group=`` make
    it. The ranks of a node are those with the same ``GROUP_RANK`` (torchrun) or ``SLURM_NODEID``, or, without such a
    launcher, on the same machine.

    Args:
        load: for errors, what the group is wanted for.

    Raises:
        GroupError: the ranks could not be asked.
    """
    if not _initialised():
        return None
    world = torch.distributed.group.WORLD
    if world_is_one_node():
        return world
    if _node_groups.get("world") is not world:
        _node_groups.update(world=world, group=_make_node_group(world, load))
    group: ProcessGroup = _node_groups["group"]
    return group


def _make_node_group(world: Any, load: str) -> Any:
    names = tell_all(world, f"{load or 'node_group()'}, ranks of a node", node_of_this_process())
    if len(set(names)) == 1:
        return world
    mine = None
    for node in sorted(set(names)):
        ranks = [rank for rank, name in enumerate(names) if name == node]
        # Every rank takes part in the making of every group.
        group = torch.distributed.new_group(ranks)
        if global_rank() in ranks:
            mine = group
    return mine


def has_cpu_backend(group: Any) -> bool:
    """Whether ranks can tell one another things past an accelerator that may be busy or missing."""
    return any(device.type == "cpu" for device in group._device_types)


def tell_all(group: Any, stage: str, mine: str) -> list[str]:
    """A few words of every rank's. A collective call; ``stage``: for errors, the load and what it is at."""
    if has_cpu_backend(group):
        # Felt by Ctrl-C, unlike torch's own.
        asked = _C.Group(group, None, "cpu", _C.Strategy.broadcast, stage)
        try:
            records = asked.agree(NODE + mine.encode()[:256].ljust(RECORD_BYTES - len(NODE)), False)
        finally:
            asked.close()
        if any(record[:1] != NODE for record in records):
            raise GroupError(f"{stage}: other ranks are at another call")
        return [record[1:].decode().rstrip() for record in records]
    texts: list[Any] = [None] * torch.distributed.get_world_size(group)
    try:
        torch.distributed.all_gather_object(texts, mine, group=group)
    except (RuntimeError, OSError) as error:
        pass_on(error)
        raise GroupError(f"{stage}: {error}") from error
    return texts


def _nodes_of(group: ProcessGroup, load: str) -> int:
    """How many nodes a group's ranks are on. All ranks get the same answer; they ask one another the first time."""
    for known, nodes in _nodes:
        if known() is group:
            return nodes
    nodes = len(set(tell_all(group, f"{load}, nodes of the group", node_of_this_process())))
    _nodes[:] = [(known, number) for known, number in _nodes if known() is not None] + [(weakref.ref(group), nodes)]
    return nodes


def is_one_node(group: ProcessGroup) -> bool:
    """Whether all ranks of a group of ``resolve_group`` are on one node, as was found out there."""
    return all(nodes == 1 for known, nodes in _nodes if known() is group)  # else it is a node_group()


def require_strategy(strategy: str) -> None:
    """Raise ``ValueError`` for what is no ``Strategy``."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: must be one of {', '.join(STRATEGIES)}")


def group_of_dimension(mesh: Any, dimension: int) -> ProcessGroup | None:
    """The ranks that follow one another along a dimension of a DeviceMesh, if they can speak: not of a fake group."""
    try:
        group: ProcessGroup = mesh.get_group(dimension)
        return None if torch.distributed.get_backend(group) == "fake" else group
    except Exception as failed:  # a mesh that was made without groups
        pass_on(failed)
        return None


def require_group(group: object) -> None:
    """Raise ``ValueError`` for what is no group that this process is a member of; None is no group."""
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(f"group={group!r}: this process is not a member of it, or it is no process group")


@plainly
def resolve_group(
    group: ProcessGroup | None,
    strategy: str,
    device_type: str,
    load: str,
    remote: bool = False,
    checked: bool = False,
) -> tuple[ProcessGroup | None, str]:
    """The group that shares a load, or None where this process reads everything itself; and the strategy.

    A group with ``"independent"``: its ranks agree on the load, since they were told to load together, and then each
    reads for itself.

    ``remote``: a server has some of it. ``checked``: files are checked, for which one rank must have been given all
    bytes of what a server has.

    Raises:
        ValueError: a group that this process is no member of.
    """
    require_group(group)
    if strategy == "independent" or not _initialised():
        return None, "independent"
    nodes = 1
    if group is None:
        if strategy == "auto" and auto_strategy(device_type, 2, remote=remote) == "independent":
            return None, "independent"  # within a node, whatever the node
        group = node_group(load)
    else:  # whatever this rank's strategy: should the others' be another, the agreement says so
        nodes = _nodes_of(group, load)
    assert group is not None
    ranks = torch.distributed.get_world_size(group)
    chosen = auto_strategy(device_type, ranks, nodes, remote) if strategy == "auto" else strategy
    if strategy == "auto" and remote and checked and chosen == "striped":
        chosen = "broadcast"
    if ranks == 1 or (chosen == "independent" and not has_cpu_backend(group)):
        return None, "independent"
    return group, chosen
