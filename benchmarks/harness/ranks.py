"""The processes of a torchrun, on one node or on several, or this one alone; and the groups they load in."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """All processes of the run. Without a launcher nothing is initialised, and it is this process alone."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # launchers call a node's processes a group
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        self.on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.first = os.environ.get("RANK", "0") == "0"
        self.first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        self.on_cpu: dist.ProcessGroup | None = None  # what times are agreed on by; None: the default group
        self.initialise()

    def initialise(self) -> None:
        if self.count > 1:
            dist.init_process_group("gloo")

    def barrier(self) -> None:
        """Wait for all ranks. On the CPU, whichever backend their groups have for an accelerator."""
        self.most([0.0])

    def most(self, values: list[float]) -> list[float]:
        """The largest of all ranks' values, one by one."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.on_cpu)
        return [float(value) for value in tensor]

    def slowest(self, seconds: float) -> float:
        return self.most([seconds])[0]

    def in_turns(self, of_a_node: Callable[[], object]) -> None:
        """Call it once on each node, one node after another: hosts may share a machine, and so a page cache."""
        for node in range(self.nodes):
            if self.first_of_node and self.node == node:
                of_a_node()
            self.barrier()

    def close(self) -> None:
        """Must run before the interpreter ends, and nothing else may refer to the groups then.

        Gloo's threads let go of a collective's tensors a moment after it is done, which takes the GIL; a thread that
        asks for it while the interpreter goes down aborts the process. A group joins its threads with its last
        reference.
        """
        self.on_cpu = None
        if dist.is_initialized():
            dist.destroy_process_group()


class GroupedRanks(Ranks):
    """All processes, with torch.distributed initialised for a device, and a group that loads together.

    The group is the ranks of this node, which is weightload's default, or all ranks. A backend that is named need not
    have anything for the CPU: times are then agreed on by another group.
    """

    def __init__(self, device: torch.device, whole: bool, backend: str | None = None) -> None:
        self.named = backend is not None
        self.backend = backend or "gloo"
        if backend is None and device.type != "cpu":
            # Times and barriers are agreed on by the CPU, weights by the accelerator's own backend.
            self.backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        super().__init__()
        self.group = self._group(whole)
        self.group_size = dist.get_world_size(self.group)
        self.first_of_group = dist.get_rank(self.group) == 0

    def initialise(self) -> None:
        if self.count > 1:
            dist.init_process_group(self.backend)
        else:  # a group of one, so that every way of loading runs here too
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(self.backend, store=store, rank=0, world_size=1)
        if self.named:
            self.on_cpu = dist.new_group(backend="gloo")

    def _group(self, whole: bool) -> dist.ProcessGroup:
        nodes = self.gather(os.environ.get("GROUP_RANK", socket.gethostname()))
        world = dist.group.WORLD
        if world is not None and (whole or len(set(nodes)) == 1):
            return world
        members = [[rank for rank, there in enumerate(nodes) if there == node] for node in dict.fromkeys(nodes)]
        groups: list[dist.ProcessGroup] = [dist.new_group(ranks) for ranks in members]  # every rank makes all of them
        return next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)

    def close(self) -> None:
        del self.group
        super().close()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.on_cpu)
        return values
