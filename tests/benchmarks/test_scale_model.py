"""The model of loads on many nodes: it obeys what it is made of, recommends what the package does, and says so."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from weightload._group.ranks import auto_strategy

SCRIPT = ROOT / "benchmarks" / "scale/model.py"
sys.path.insert(0, str(ROOT / "benchmarks"))

from scale.costs import GROUPS, STORAGES, STRATEGIES, Assumptions, Load, Storage, seconds, stages, startup  # noqa: E402
from scale.model import (  # noqa: E402
    CHOICES,
    NODES,
    _time,
    deviations,
    node_counts,
    predict,
    published,
    recommend,
    recommend_one_group,
)
from scale.shards import (  # noqa: E402
    BROADCAST,
    EXCHANGE,
    OWN,
    PLANS,
    STRIPED,
    Shards,
    predict_shards,
    seconds_of,
    ways_of,
)
from scale.shards import NODES as SHARD_NODES  # noqa: E402
from scale.shards import stages as shard_stages  # noqa: E402

SIZE = 140e9
DEVICES = ("accelerator", "cpu")
MACHINE = Assumptions()
SCENARIOS = [(d, s, n) for d in DEVICES for s in STORAGES for n in node_counts(s)]


@pytest.mark.parametrize(("device", "storage", "nodes"), SCENARIOS, ids=lambda v: getattr(v, "name", str(v)))
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_auto_does_what_the_model_recommends(device: str, storage: Storage, nodes: int, gpus: int) -> None:
    machine = dataclasses.replace(MACHINE, gpus=gpus)
    if gpus == 1:  # nothing to share in a group of one
        rows = predict(storage, nodes, SIZE, device, machine)
        assert len({row["seconds"] for row in rows if row["group"] == "node"}) == 1
        assert auto_strategy("cuda", 1, 1) == "independent"
        return
    kind = "cuda" if device == "accelerator" else "cpu"
    assert recommend(storage, nodes, SIZE, device, machine) == auto_strategy(kind, gpus, 1)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("nodes", NODES[1:])
def test_auto_does_for_a_group_over_nodes_what_the_model_recommends(nodes: int, gpus: int) -> None:
    machine = dataclasses.replace(MACHINE, gpus=gpus)
    for device, kind in (("accelerator", "cuda"), ("cpu", "cpu")):
        ranks = nodes * gpus
        assert recommend_one_group(nodes, SIZE, device, machine) == auto_strategy(kind, ranks, nodes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)
def test_more_bytes_never_load_faster(storage: Storage, device: str) -> None:
    sizes = [10 ** (exponent / 8) for exponent in range(32, 104)]
    for strategy, group in CHOICES:
        for nodes in (2, 1000):
            times = [seconds(Load(strategy, group, storage, nodes, size, device)) for size in sizes]
            assert times == sorted(times)


def test_never_faster_than_the_slowest_stage_and_never_slower_than_all_of_them() -> None:
    for device, storage, nodes in SCENARIOS:
        for row in predict(storage, nodes, SIZE, device, MACHINE):
            assert row["limit"] in row["stages"]
            assert max(row["stages"].values()) < row["seconds"] < sum(row["stages"].values()) * 1.1 + 10
            assert row["stages"][row["limit"]] == max(row["stages"].values())
    load = Load("striped", "node", STORAGES[0], 1, SIZE)
    assert seconds(load) >= SIZE / STORAGES[0].node + startup(load)
    added = dataclasses.replace(load, machine=dataclasses.replace(MACHINE, overlap=False))
    assert seconds(added) == pytest.approx(startup(load) + sum(stages(load).values()))


def test_a_group_that_shares_reads_every_byte_once() -> None:
    for nodes in NODES:
        for strategy in STRATEGIES:
            for group in GROUPS:
                load = Load(strategy, group, STORAGES[0], nodes, SIZE)
                reading, per_node = load.readers()
                groups = nodes // load.spanned
                copies = nodes * MACHINE.gpus if strategy == "independent" else groups
                assert reading * per_node * load.rank_bytes() == pytest.approx(copies * SIZE)


def test_each_stage_is_as_fast_as_its_link() -> None:
    one = stages(Load("striped", "node", STORAGES[1], 1, SIZE))
    assert one["pcie"] == pytest.approx(SIZE / 8 / MACHINE.pcie)
    assert one["page cache"] == pytest.approx(SIZE / MACHINE.cache_node)
    assert one["collective"] > SIZE * 7 / 8 / MACHINE.peer
    assert stages(Load("broadcast", "node", STORAGES[1], 1, SIZE))["pcie"] == pytest.approx(SIZE / MACHINE.pcie)
    alone = stages(Load("independent", "node", STORAGES[0], 1, SIZE))
    assert alone["storage"] == pytest.approx(8 * SIZE / STORAGES[0].node)  # read directly, by every rank
    assert "collective" not in alone
    shared = stages(Load("striped", "node", STORAGES[2], 100, SIZE))
    assert shared["storage"] > 100 * SIZE / STORAGES[2].total


def test_published_times_are_predicted() -> None:
    """Within a factor of 2.5, and never much slower: the model is one of limits."""
    for row in published():
        assert 1 / 2.5 < row["ratio"] < 1.15, row


def test_where_striped_is_wrong_the_model_says_so() -> None:
    found = deviations(SIZE, MACHINE)
    assert found
    assert {row["links"] for row in found} == {"PCIe gen4", "PCIe gen4, no peer access"}  # none with NVLink
    assert all(row["times"][row["fastest"]] < row["times"]["striped"] for row in found)


def test_the_script_writes_what_it_promises(tmp_path: Path) -> None:
    out, plot = tmp_path / "scale.json", tmp_path / "scale.png"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--gigabytes", "61", "--json", out, "--plot", plot], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for storage in STORAGES:
        assert storage.title in done.stdout
    result = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["bytes"] == 61e9
    assert len(result["recommended"]) == len(SCENARIOS)
    assert {row["nodes"] for row in result["rows"]} == set(NODES)
    assert len(result["shards"]) == len(PLANS) * sum(len(SHARD_NODES) - s.one_copy for s in STORAGES)
    assert "Parts of 61 GB" in done.stdout
    assert result["assumptions"]["pcie"] == MACHINE.pcie
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argument", ["--gigabytes=0", "--gigabytes=-3", "--gigabytes=nan", "--gigabytes=inf",
                                      "--gigabytes=many", "--check-ranks=0", "--nodes=3"])  # fmt: skip
def test_bad_arguments_are_refused(argument: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, argument], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.parametrize("bad", [{"strategy": "auto"}, {"group": "rack"}, {"device": "tpu"}, {"nodes": 0},
                                 {"size": 0}, {"size": math.nan}, {"size": math.inf}])  # fmt: skip
def test_loads_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    good: dict[str, object] = {"strategy": "striped", "group": "all", "storage": STORAGES[0], "nodes": 2, "size": 1e9}
    Load(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load"):
        Load(**{**good, **bad})  # type: ignore[arg-type]


def test_measurements_become_predictions() -> None:
    from scale.check import compare

    measured = {
        "ranks": 2, "files": 3, "read_alone_bps": 10e9, "read_together_bps": 10e9, "map_bps": 100e9,
        "broadcast_bps": 4e9, "gather_bps": 5e9, "status_s": 1e-3, "open_s": 0.0,
        "loads": {"independent": [0.02, 0.01, 0.03], "broadcast": [0.4], "striped": None},
    }  # fmt: skip
    independent, broadcast, striped = compare(measured, 10**9)["loads"]
    assert independent["measured_s"] == 0.02
    assert broadcast["predicted_s"] == pytest.approx(0.1 + 0.25, rel=0.15)  # read, then sent
    assert broadcast["ratio"] == pytest.approx(broadcast["predicted_s"] / 0.4)
    assert striped["predicted_s"] == pytest.approx(0.1 + 0.2, rel=0.2)
    assert striped["ratio"] is None


def shard_loads(size: float = SIZE) -> list[Shards]:
    return [
        Shards(plan, way, storage, nodes, size)
        for plan in PLANS
        for way in ways_of(plan)
        for storage in STORAGES
        for nodes in (SHARD_NODES[1:] if storage.one_copy else SHARD_NODES)
    ]


def test_parts_add_up_to_the_whole() -> None:
    for load in shard_loads():
        ranks, plan = load.nodes * load.machine.gpus, load.plan
        copies = ranks if plan.whole else load.replicas
        assert load.part() * ranks == pytest.approx(SIZE * (plan.whole * copies + (1 - plan.whole) * load.replicas))
        read = load.rank_bytes() * ranks
        once = load.way != OWN or (plan.nodes_share and not plan.whole)
        assert read == pytest.approx(SIZE) if once else read > SIZE * (1 - 1e-9)
        # A node's storage gives no less than what its ranks differ in, and no more than all.
        assert load.node_bytes() <= SIZE * (1 + 1e-9)
        assert load.node_bytes() >= SIZE * (1 - plan.whole) / load.nodes * (1 - 1e-9)


def test_parts_are_never_faster_than_their_slowest_stage() -> None:
    for load in shard_loads():
        parts = shard_stages(load)
        assert max(parts.values()) < seconds_of(load) < sum(parts.values()) + 1
        assert ("collective" in parts) == (load.way == EXCHANGE or (load.way == STRIPED and load.nodes > 1))
        assert parts["pcie"] == pytest.approx(load.rank_bytes() / MACHINE.pcie)
        assert load.fetched() >= (0 if load.storage.cached else load.node_bytes() * (1 - 1e-9))


def test_more_bytes_never_make_parts_faster() -> None:
    sizes = [10 ** (exponent / 8) for exponent in range(48, 104)]
    for load in shard_loads():
        times = [seconds_of(dataclasses.replace(load, size=size)) for size in sizes]
        assert times == sorted(times)


def test_where_reading_ones_own_part_is_right_and_where_not() -> None:
    times = {(row["storage"], row["plan"], row["nodes"]): row["seconds"] for row in predict_shards(SIZE, MACHINE)}
    for (storage, plan, nodes), took in times.items():
        if plan == "fsdp" and storage != "one-copy":
            assert took[OWN] <= took[BROADCAST] * 1.02, (storage, nodes)
        if nodes >= 4 and storage.startswith("shared") and STRIPED in took:
            assert took[STRIPED] < took[OWN]
        if nodes >= 4 and storage.startswith("shared") and EXCHANGE in took:
            assert took[EXCHANGE] < took[BROADCAST] < took[OWN]
    assert times["local-cold", "fsdp", 64][OWN] < times["local-cold", "fsdp", 1][OWN] / 20


@pytest.mark.parametrize("bad", [{"way": "auto"}, {"way": EXCHANGE}, {"nodes": 0}, {"size": 0}, {"size": math.nan}])
def test_parts_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    good: dict[str, object] = {"plan": PLANS[0], "way": OWN, "storage": STORAGES[0], "nodes": 2, "size": 1e9}
    Shards(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load"):
        Shards(**{**good, **bad})  # type: ignore[arg-type]


def test_the_table_of_the_page_is_what_the_model_says() -> None:
    rows = {
        (next(s.title for s in STORAGES if s.name == row["storage"]), row["plan"], row["nodes"]): row["seconds"]
        for row in predict_shards(SIZE, MACHINE)
    }
    found = 0
    for line in (ROOT / "benchmarks" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        plan = next((plan for plan in PLANS if len(cells) == 8 and plan.title == cells[1]), None)
        if plan:
            found += 1
            seconds_by_way = rows[cells[0], plan.name, int(cells[2])]
            for way, cell in zip((OWN, STRIPED, EXCHANGE, BROADCAST), cells[4:], strict=True):
                assert cell == (_time(seconds_by_way[way]) if way in seconds_by_way else "")
    assert found == 2 * 3 * len(PLANS)
