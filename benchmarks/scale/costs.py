"""The time to load a checkpoint on many nodes, as a sum of costs; every number it rests on is in `Assumptions`.

A load is a pipeline: storage, page cache, PCIe, collective. Its stages overlap, so it takes as long as the slowest of
them, plus what the first block spends in the others (the fill), plus start-up. Creating the communicator is left out:
the engine needs it anyway. Times in seconds, sizes in bytes, rates in bytes a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MIB = 1 << 20
STRATEGIES = ("independent", "broadcast", "striped")
GROUPS = ("node", "all")


@dataclass(frozen=True)
class Assumptions:
    """A node like an HGX H100 or H200, and the loader's own sizes. "Assumed" is said where no source is known."""

    gpus: int = 8
    """Ranks of a node, one a GPU."""

    pcie: float = 55e9
    """Host to one GPU, page-locked memory, PCIe gen5 x16 (63 GB/s raw; 55 is what copies reach)."""

    peer: float = 360e9
    """Into one GPU from the others of its node: NCCL's bus bandwidth on NVLink 4 with NVSwitch (450 one way raw)."""

    peer_over_pcie: bool = False
    """Without NVLink what comes from other GPUs shares the PCIe link with what comes from the host."""

    nic: float = 45e9
    """One of the node's NICs, one a GPU: 400 Gb/s are 50 GB/s raw, of which collectives reach about nine tenths."""

    peer_hop: float = 1.9e-6
    """One step of NCCL's ring over NVLink (its tuning table, hwLat, ring, LL128; 3.4 for protocol Simple)."""

    net_hop: float = 4.0e-6
    """One step of NCCL's ring over the network (ring, LL128; 14 for Simple)."""

    launch: float = 20e-6
    """Start of one NCCL collective: launch and kernel, as small all-reduces in one node show (12 to 16 us)."""

    cache_rank: float = 100e9
    """Out of the page cache by one process: 16 threads at 10 GB/s each, less what memory bounds."""

    cache_node: float = 120e9
    """Out of the page cache by all processes of a node: assumed; each byte is read, written and read again by DMA, out
    of about 600 GB/s of 16 channels of DDR5. InstantTensor's 57 GB/s (see `PUBLISHED`) would halve it."""

    map_rank: float = 40e9
    """CPU targets: page-table entries made by one process, as bytes mapped (measured: 11 with pages of 4 KiB, 149 with
    large folios, two threads each)."""

    host_broadcast: float = 4.5e9
    """gloo between two ranks of a node, 64 MiB at a time (measured on 2 CPUs). Its broadcast is a binomial tree of
    whole messages: ceil(log2 ranks) times the bytes pass, one after another (gloo/broadcast.cc)."""

    host_gather: float = 4.5e9
    """gloo gathering stripes, which the loader sends as a broadcast from every rank at once: gloo's own all-gather
    copies everything twice more and gives 0.6 GB/s where these give 2.4 (2 ranks on 2 CPUs)."""

    host_memory: float = 40e9
    """All ranks of a node together receiving through gloo: every byte is copied three times. Assumed."""

    host_nic: float = 12.5e9
    """gloo between nodes: TCP on one interface of 100 Gb/s. Assumed."""

    status_step: float = 60e-6
    """One step of a small collective between hosts (gloo over TCP, CPUs to spare; 400 us measured on 2 busy CPUs)."""

    status_ring: bool = False
    """A small all-gather takes ranks - 1 steps, as gloo's does, rather than log2 of them, as a tree would."""

    slot: int = 8 * MIB
    block: int = 128 * MIB
    ring: int = 256 * MIB
    threads: int = 16
    """The loader's settings: one read, one collective, page-locked memory, reading threads."""

    page_lock: float = 4e9
    """Page-locking the ring, which is done while headers are opened. Assumed (drivers: 2 to 8 GB/s)."""

    files: int = 30
    open_file: float = 0.5e-3
    """Files of the checkpoint (of about 5 GB); opening one and checking its header (measured here)."""

    spread_node: float = 0.05
    """Standard deviation of a node's read rate between nodes. Assumed. The slowest of m is about
    sqrt(2 ln m) deviations slower than the mean (the maximum of m normal values)."""

    spread_block: float = 0.15
    """Standard deviation of one block's reads. One group over m nodes waits for the slowest at every block. Assumed."""

    overlap: bool = True
    """Stages overlap. False: they share the same few CPUs, and add up."""


@dataclass(frozen=True)
class Storage:
    """Where the bytes lie. A rate of infinity is no limit."""

    name: str
    title: str
    node: float = math.inf  # one node
    rank: float = math.inf  # one process
    total: float = math.inf  # all nodes together
    cached: bool = False  # in every node's page cache already
    shared_cache: bool = False  # read through the page cache: a copy more, but the ranks of a node share one reading
    one_copy: bool = False  # on one node's disks; `total` is what that node serves to all others
    request: float = 0.1e-3  # latency of one read
    opens: float = math.inf  # files that can be opened a second, by all nodes together


STORAGES = (
    # Four NVMe disks of gen4, or two of gen5; fastsafetensors reached 26.4 GB/s.
    Storage("local-cold", "local disks, cold page cache", node=26e9),
    Storage("local-warm", "local disks, warm page cache", cached=True, request=20e-6),
    # 40 GB/s a node is what NVIDIA promises of a DGX H100's storage network; one process gets less of it in the ratio
    # that InstantTensor did (34.5 of 45 GB/s); the total is an example.
    Storage("shared-fast", "parallel file system, 125 GB/s", 40e9, 35e9, 125e9, False, True, False, 1e-3, 100e3),
    Storage("shared-slow", "file server, 10 GB/s", 5e9, 5e9, 10e9, False, True, False, 1e-3, 20e3),  # an example
    # NFS over RDMA gives one server about 20 GB/s; the collective does not pass through it. Assumed.
    Storage("one-copy", "one node's disks, spread by network", 26e9, 26e9, 20e9, False, True, True, 0.3e-3, 20e3),
)


@dataclass(frozen=True)
class Load:
    """A load of a size from a storage by a strategy, within nodes or in one group over all."""

    strategy: str
    group: str
    storage: Storage
    nodes: int
    size: float
    device: str = "accelerator"
    machine: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES or self.group not in GROUPS or self.device not in ("accelerator", "cpu"):
            raise ValueError(f"no such load: {self.strategy}, {self.group}, {self.device}")
        if self.nodes < 1 or self.machine.gpus < 1 or not 0 < self.size < math.inf:
            raise ValueError("a load needs a node, a rank and a byte")

    @property
    def spanned(self) -> int:
        """Nodes of one group."""
        return self.nodes if self.group == "all" else 1

    @property
    def ranks(self) -> int:
        """Ranks of one group."""
        return self.spanned * self.machine.gpus

    @property
    def shares(self) -> bool:
        """Bytes travel between ranks."""
        return self.strategy != "independent" and self.ranks > 1

    def rank_bytes(self) -> float:
        """Bytes that a reading rank reads."""
        return self.size / self.ranks if self.strategy == "striped" else self.size

    def readers(self) -> tuple[int, int]:
        """(nodes that read, ranks that read on each of them)."""
        alone = self.strategy == "broadcast"
        return (self.nodes // self.spanned if alone else self.nodes), (1 if alone else self.machine.gpus)

    def blocks(self) -> float:
        """Blocks of the plan; not rounded, so that a byte more never loads faster."""
        return max(1.0, self.size / self.machine.block)


def stages(load: Load) -> dict[str, float]:
    """Seconds that each stage needs for the whole load, were it alone."""
    machine, storage = load.machine, load.storage
    nodes, per_node = load.readers()
    rank_bytes = load.rank_bytes()
    read = rank_bytes * per_node  # by the processes of one node
    maps = load.device == "cpu" and not load.shares
    shared = storage.shared_cache or maps  # the ranks of a node share one reading of the storage
    fetched = 0.0 if storage.cached else min(read, load.size) if shared else read
    remote = nodes - 1 if storage.one_copy else nodes
    if storage.one_copy and load.strategy == "broadcast" and load.group == "all":
        remote = 0  # its root is where the copy is
    reads = max(1.0, min(rank_bytes, machine.block * rank_bytes / load.size) / machine.slot)  # of a block by one rank
    found = {
        "storage": max(
            fetched / storage.node,
            (rank_bytes / storage.rank) if fetched else 0.0,
            fetched * remote / storage.total,
            load.blocks() * reads * storage.request / min(machine.threads, 2 * reads),  # two blocks are in flight
        )
        * spread(machine, nodes, in_step=load.spanned > 1 and load.shares)
    }
    if maps:
        found["page tables"] = rank_bytes / machine.map_rank
    elif storage.cached or storage.shared_cache or load.device == "cpu":
        found["page cache"] = max(rank_bytes / machine.cache_rank, read / machine.cache_node)
    if load.device == "accelerator":
        received = load.size * (load.ranks - 1) / load.ranks if load.shares and machine.peer_over_pcie else 0.0
        found["pcie"] = (rank_bytes + received) / machine.pcie
    if load.shares:
        found["collective"] = _collective(load)
        found["status"] = load.blocks() * status_time(load)
    return found


def spread(machine: Assumptions, nodes: int, in_step: bool) -> float:
    """How much longer the slowest node reads than the mean one; ``in_step``: at every block they wait for it."""
    deviation = machine.spread_block if in_step else machine.spread_node
    return 1 + deviation * math.sqrt(2 * math.log(nodes))


def ring_latency(ranks: int, nodes: int, machine: Assumptions) -> float:
    """Seconds from one end of NCCL's ring over these ranks to the other: what an all-gather takes at least."""
    between = nodes if nodes > 1 else 0
    return between * machine.net_hop + max(0, ranks - 1 - between) * machine.peer_hop


def status_time(load: Load) -> float:
    """Seconds in which the ranks tell each other that all is well."""
    steps = load.ranks - 1 if load.machine.status_ring else math.ceil(math.log2(load.ranks))
    return steps * load.machine.status_step


def _collective(load: Load) -> float:
    machine, ranks, nodes = load.machine, load.ranks, load.spanned
    striped = load.strategy == "striped"
    # Into one rank, and into one node.
    into_rank = load.size * ((ranks - 1) / ranks if striped else 1)
    into_node = load.size * ((nodes - 1) / nodes if striped else 1) if nodes > 1 else 0.0
    if load.device == "cpu":
        steps = (ranks - 1) if striped else math.ceil(math.log2(ranks))
        if striped:
            # Every rank of a node gets its own copy through the one interface.
            moving = max(into_rank / machine.host_gather, into_node * machine.gpus / machine.host_nic)
        else:
            # Near ranks first: the last rounds cross nodes, all ranks of a node at once through its one interface.
            within = min(steps, math.ceil(math.log2(machine.gpus)))
            crossing = max(1 / machine.host_broadcast, machine.gpus / machine.host_nic)
            moving = load.size * (within / machine.host_broadcast + (steps - within) * crossing)
        return max(moving, into_rank * machine.gpus / machine.host_memory) + load.blocks() * steps * machine.status_step
    moved = max(into_rank / machine.peer if machine.gpus > 1 else 0.0, into_node / (machine.nic * machine.gpus))
    # A broadcast's root goes on to the next block when it has sent one; an all-gather ends when the ring is round.
    return moved + load.blocks() * (machine.launch + (ring_latency(ranks, nodes, machine) if striped else 0.0))


def startup(load: Load) -> float:
    """Seconds before the first read: headers, page-locking, agreement."""
    machine = load.machine
    headers = max(machine.files * machine.open_file, machine.files * load.nodes * machine.gpus / load.storage.opens)
    locking = min(machine.ring, load.rank_bytes()) / machine.page_lock if load.device == "accelerator" else 0.0
    return max(headers, locking) + (status_time(load) if load.shares else 0.0)


def seconds(load: Load) -> float:
    """The time of the load on its slowest rank."""
    parts = stages(load)
    if not load.machine.overlap:
        return startup(load) + sum(parts.values())
    piece = load.machine.block if load.shares else load.machine.slot
    took = fill_and_slowest(parts, min(1.0, piece / load.size))
    if load.strategy == "broadcast" and load.shares and load.device == "accelerator":
        took += ring_latency(load.ranks, load.spanned, load.machine)  # the chain, once
    return startup(load) + took


def fill_and_slowest(parts: dict[str, float], first: float) -> float:
    """Seconds of a pipeline whose first piece is this share of the whole."""
    slowest = max(parts.values())
    return slowest + (sum(parts.values()) - slowest) * first
