"""The time in which ranks get their parts of a checkpoint: each reads its own, or they share; for scale/model.py.

Costs, assumptions and units are those of scale/costs.py. What is only modelled, and not in the package: replicas that
stripe a shard between them, and an all-to-all of inner dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from scale.costs import STORAGES, Assumptions, Load, Storage, fill_and_slowest, ring_latency, seconds, spread

OWN = "own part"
STRIPED = "replicas stripe"  # each replica reads an equal share of a shard, and an all-gather completes it
EXCHANGE = "all-to-all"  # each rank reads rows, and the ranks exchange columns
BROADCAST = "whole files, broadcast"  # the better one of a group a node and of one over all, and every rank cuts
NODES = (1, 2, 4, 8, 16, 32, 64)

ROW = 20e3
"""Bytes of a row of the matrices that are cut into columns (Llama-3-8B: 8 to 28 KB in bf16)."""

PIECE_S = 1e-6
"""One read of a piece that is in the page cache: a call costs about as much as copying 8 KiB."""

PEER_S = 2e-6
"""An all-to-all, for each other rank. Assumed: half a step of NCCL's ring over the network, with many under way."""


@dataclass(frozen=True)
class Plan:
    """How the tensors are dealt out."""

    name: str
    title: str
    whole: float = 0.0
    """Share of the bytes that every rank has."""
    nodes_share: bool = True
    """All ranks of all nodes share the rest; else those of a node do, and nodes are replicas."""
    inner: float = 0.0
    """Share of the bytes that is cut into columns."""


PLANS = (
    Plan("fsdp", "FSDP over all ranks, rows"),
    Plan("fsdp-columns", "FSDP over all ranks, columns", inner=1.0),
    # o_proj and down_proj of Llama-3-8B.
    Plan("tp", "TP within a node, nodes are replicas", nodes_share=False, inner=0.35),
    Plan("hsdp", "HSDP, a shard group a node", nodes_share=False),
    # Qwen3-30B-A3B: 29.0 of 30.5 billion parameters are the experts'.
    Plan("ep", "EP over all ranks, the rest on each", whole=0.05),
)


@dataclass(frozen=True)
class Shards:
    """A load of every rank's part, to accelerators."""

    plan: Plan
    way: str
    storage: Storage
    nodes: int
    size: float
    machine: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        if (
            self.nodes < 1
            or self.machine.gpus < 1
            or not 0 < self.size < math.inf
            or self.way not in ways_of(self.plan)
        ):
            raise ValueError(f"no such load: {self.plan.name}, {self.way}, {self.nodes} nodes")

    @property
    def sharing(self) -> int:
        """Ranks that have different parts."""
        return self.machine.gpus * (self.nodes if self.plan.nodes_share else 1)

    @property
    def replicas(self) -> int:
        """Ranks that have the same part."""
        return self.machine.gpus * self.nodes // self.sharing

    def part(self) -> float:
        """Bytes that a rank gets in the end."""
        return self.size * (self.plan.whole + (1 - self.plan.whole) / self.sharing)

    def rank_bytes(self) -> float:
        """Bytes of them that it reads."""
        return self.part() / self.replicas if self.way == STRIPED else self.part()

    def columns(self) -> float:
        """Share of the bytes that is read as columns; replicas that stripe them take some of the rows each."""
        return {OWN: self.plan.inner, STRIPED: self.plan.inner / self.replicas, EXCHANGE: 0.0}[self.way]

    def node_bytes(self) -> float:
        """Different bytes that the ranks of a node read; of columns, whole rows: storage has no less to give."""
        rows = self.size * self.plan.whole + self.machine.gpus * (self.rank_bytes() - self.size * self.plan.whole)
        between = self.columns() * self.size - self.plan.inner * rows
        return rows + max(0.0, between if self.columns() else 0.0)

    def fetched(self) -> float:
        """Bytes that storage gives to a node."""
        if self.storage.cached:
            return 0.0
        if self.storage.shared_cache:
            return self.node_bytes()
        # Direct reads of rows share nothing; columns go through the page cache.
        if self.columns():
            return self.node_bytes()
        return self.machine.gpus * self.rank_bytes()


def ways_of(plan: Plan) -> tuple[str, ...]:
    """Ways that make sense for a plan, beside whole files."""
    more = ((STRIPED,) if not plan.nodes_share else ()) + ((EXCHANGE,) if plan.inner == 1 else ())
    return (OWN, *more)


def stages(load: Shards) -> dict[str, float]:
    """Seconds that each stage needs for the whole load, were it alone."""
    machine, storage, nodes = load.machine, load.storage, load.nodes
    rank_bytes, fetched = load.rank_bytes(), load.fetched()
    remote = nodes - 1 if storage.one_copy else nodes
    shares = load.way == EXCHANGE or (load.way == STRIPED and load.replicas > 1)
    reads = max(1.0, rank_bytes / machine.slot)
    found = {
        "storage": max(
            fetched / storage.node,
            rank_bytes / storage.rank if fetched else 0.0,
            fetched * remote / storage.total,
            reads * storage.request / min(machine.threads, reads),
        )
        * spread(machine, nodes, in_step=shares and nodes > 1),
        "pcie": rank_bytes / machine.pcie,
    }
    pieces = load.columns() * load.size / ROW
    if storage.cached or storage.shared_cache or pieces:
        found["page cache"] = (
            max(rank_bytes / machine.cache_rank, machine.gpus * rank_bytes / machine.cache_node)
            + pieces * PIECE_S / machine.threads
        )
    if shares:
        found["collective"] = _collective(load)
    return found


def _collective(load: Shards) -> float:
    machine, nodes = load.machine, load.nodes
    if load.way == STRIPED:
        # Between nodes, each rank through the NIC of its own, with those of the other nodes that have the same part.
        blocks = max(1.0, load.part() / machine.block)
        into_rank = load.part() * (load.replicas - 1) / load.replicas
        latency = ring_latency(load.replicas, load.replicas, machine)
        return into_rank / machine.nic + blocks * (machine.launch + latency)
    ranks = machine.gpus * nodes
    blocks = max(1.0, load.size / machine.block / machine.gpus)
    into_rank = load.part() * (ranks - 1) / ranks
    from_others = load.part() * (nodes - 1) / nodes
    moving = max(into_rank / machine.peer, from_others / machine.nic)
    return moving + blocks * (machine.launch + (ranks - 1) * PEER_S)


def startup(load: Shards) -> float:
    """Seconds before the first read: headers, page-locking."""
    machine = load.machine
    headers = max(machine.files * machine.open_file, machine.files * load.nodes * machine.gpus / load.storage.opens)
    return max(headers, min(machine.ring, load.rank_bytes()) / machine.page_lock)


def seconds_of(load: Shards) -> float:
    """The time of the load on its slowest rank."""
    piece = load.machine.slot if load.way == OWN else load.machine.block
    return startup(load) + fill_and_slowest(stages(load), min(1.0, piece / load.rank_bytes()))


def whole_files(storage: Storage, nodes: int, size: float, machine: Assumptions) -> float:
    """Whole files and a broadcast, of which each rank keeps its part."""
    groups = ("node", "all") if nodes > 1 else ("node",)
    return min(seconds(Load("broadcast", group, storage, nodes, size, "accelerator", machine)) for group in groups)


def predict_shards(size: float, machine: Assumptions) -> list[dict[str, Any]]:
    """A row for each storage, plan and number of nodes: seconds by way, and what limits reading one's own part."""
    rows = []
    for storage in STORAGES:
        for plan in PLANS:
            for nodes in NODES[1:] if storage.one_copy else NODES:
                loads = {way: Shards(plan, way, storage, nodes, size, machine) for way in ways_of(plan)}
                parts = stages(loads[OWN])
                rows.append(
                    {
                        "storage": storage.name,
                        "plan": plan.name,
                        "nodes": nodes,
                        "rank_bytes": loads[OWN].part(),
                        "node_bytes": loads[OWN].node_bytes(),
                        "limit": max(parts, key=lambda name: parts[name]),
                        "seconds": {way: seconds_of(load) for way, load in loads.items()}
                        | {BROADCAST: whole_files(storage, nodes, size, machine)},
                    }
                )
    return rows


def print_shards(rows: list[dict[str, Any]], size: float, time: Any) -> None:
    """Tables for people, in markdown; ``time`` words a number of seconds."""
    ways = (OWN, STRIPED, EXCHANGE, BROADCAST)
    for storage in STORAGES:
        print(f"**Parts of {size / 1e9:g} GB: {storage.title}, to accelerators**\n")
        print(f"| plan | nodes | GB a rank | {' | '.join(ways)} | own part's limit |")
        print("| --- |" + " ---: |" * (2 + len(ways)) + " --- |")
        for row in rows:
            if row["storage"] == storage.name:
                title = next(plan.title for plan in PLANS if plan.name == row["plan"])
                cells = " | ".join(time(row["seconds"][way]) if way in row["seconds"] else "" for way in ways)
                print(f"| {title} | {row['nodes']} | {row['rank_bytes'] / 1e9:.2f} | {cells} | {row['limit']} |")
        print()
