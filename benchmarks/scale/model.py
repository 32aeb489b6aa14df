"""Models loading a checkpoint on 1 to 1000 nodes: the time by strategy, and which strategy that recommends; also of
loading only each rank's part of it (scale/shards.py).

    python benchmarks/scale/model.py [--gigabytes 140] [--json FILE] [--plot FILE.png] [--check]

A model, not a measurement: its assumptions are in scale/costs.py, each with its source. What others published is
predicted beside it, and --check measures this machine's reading and gloo, predicts loads of weightload on the CPU from
that, and runs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from scale.costs import GROUPS, MIB, STORAGES, STRATEGIES, Assumptions, Load, Storage, ring_latency, seconds, stages
from scale.shards import predict_shards, print_shards

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
# Independent ranks know nothing of groups.
CHOICES = (("independent", "node"), *((s, g) for g in GROUPS for s in STRATEGIES[1:]))
TIE = 0.05
COLOURS = {"independent": "#d1242f", "broadcast": "#bf8700", "striped": "#1f6feb"}


def predict(storage: Storage, nodes: int, size: float, device: str, machine: Assumptions) -> list[dict[str, Any]]:
    """Every strategy and group on this storage and number of nodes, fastest first."""
    rows = []
    for strategy, group in CHOICES:
        if group == "all" and nodes == 1:
            continue
        load = Load(strategy, group, storage, nodes, size, device, machine)
        parts = stages(load)
        took = seconds(load)
        row = {"device": device, "storage": storage.name, "nodes": nodes, "strategy": strategy, "group": group}
        rows.append(row | {"seconds": took, "limit": max(parts, key=lambda name: parts[name]), "stages": parts})
    return sorted(rows, key=lambda row: row["seconds"])


def recommend(storage: Storage, nodes: int, size: float, device: str, machine: Assumptions, group: str = "node") -> str:
    """The strategy to recommend: for groups within a node, or for one group over all nodes.

    What the package prefers (independent on the CPU, striped on accelerators), unless another is faster by more than
    `TIE`: the model does not know better than that.
    """
    rows = predict(storage, nodes, size, device, machine)
    times = {
        row["strategy"]: row["seconds"]
        for row in rows
        if nodes == 1 or row["group"] == group or row["strategy"] == "independent"
    }
    preferred = "independent" if device == "cpu" or machine.gpus * nodes == 1 else "striped"
    fastest = min(times, key=lambda name: times[name])
    return preferred if times[preferred] <= times[fastest] * (1 + TIE) else fastest


def recommend_one_group(nodes: int, size: float, device: str, machine: Assumptions) -> str:
    """The strategy of one group over all nodes that reads each byte once, whatever the storage: the one whose worst
    ratio to the better one, over all kinds of storage, is the smallest. A loader cannot see the storage's kind."""
    regrets = dict.fromkeys(("striped", "broadcast"), 1.0)
    for storage in STORAGES:
        times = {s: seconds(Load(s, "all", storage, nodes, size, device, machine)) for s in regrets}
        for strategy, took in times.items():
            regrets[strategy] = max(regrets[strategy], took / min(times.values()))
    return min(regrets, key=lambda strategy: regrets[strategy])


def node_counts(storage: Storage) -> tuple[int, ...]:
    """One copy on one node is a local disk where there is one node."""
    return NODES[1:] if storage.one_copy else NODES


def published() -> list[dict[str, Any]]:
    """Figures that others measured, beside the model's; a model of limits should come out lower."""
    one, four = Assumptions(gpus=1), Assumptions(gpus=4)
    memory = STORAGES[1]
    fast = Storage("published", "50 GB/s storage", 50e9, 50e9)
    disks = Storage("published", "NVMe disks", 26.4e9)

    def took(strategy: str, storage: Storage, size: float, machine: Assumptions) -> float:
        return seconds(Load(strategy, "node", storage, 1, size, "accelerator", machine))

    # FastVideo reads tensor by tensor and then broadcasts it, so that its times add up: the first run gives the rate
    # of its reading, the broadcasts of its 1264 tensors are predicted.
    a = Assumptions()
    fastvideo = 4.1 + 25.6e9 / a.peer + 1264 * (a.launch + ring_latency(4, 1, a) + 2 * a.status_step)
    gather = 2 * 1024 * MIB
    ring = gather / (8 * a.nic) + a.launch + ring_latency(256, 32, a)
    rows = [
        ("InstantTensor 0.1.4, tmpfs to one H200, 61.1 GB", 1.26, took("independent", memory, 61.07e9, one)),
        ("InstantTensor 0.1.4, tmpfs to 8 H200, 688.6 GB", 12.1, took("striped", memory, 688.6e9, a)),
        ("InstantTensor 0.1.4, 50 GB/s storage to one H200, 61.1 GB", 1.77, took("independent", fast, 61.07e9, one)),
        ("InstantTensor 0.1.4, 50 GB/s storage to 8 H200, 688.6 GB", 15.3, took("striped", fast, 688.6e9, a)),
        ("fastsafetensors, NVMe to 4 GPUs at 26.4 GB/s, 140 GB", 140 / 26.4, took("striped", disks, 140e9, four)),
        ("FastVideo, broadcast to 4 B200, 25.6 GB (one takes 4.1 s)", 4.5, fastvideo),
        ("NCCL issue 1218, all-gather of 2 GiB over 256 H100 at 200 GB/s", gather / 200e9, ring),
    ]
    return [{"what": what, "published_s": was, "predicted_s": says, "ratio": says / was} for what, was, says in rows]


def deviations(size: float, machine: Assumptions) -> list[dict[str, Any]]:
    """Loads to the accelerators of one node for which another strategy beats striped by more than a tie."""
    gen4 = dataclasses.replace(machine, pcie=25e9, peer=20e9, peer_over_pcie=True)
    kinds = {
        "NVLink": machine,
        "PCIe gen4": gen4,
        # Consumer GPUs: what one sends another goes through host memory. Assumed, as 20 GB/s above.
        "PCIe gen4, no peer access": dataclasses.replace(gen4, peer=8e9),
    }
    found = []
    for name, kind in kinds.items():
        for gpus in (2, 4, 8):
            for gigabytes in (0.01, 0.1, 1.0, 10.0, size / 1e9):
                files = max(1, min(kind.files, math.ceil(gigabytes / 5)))
                here = dataclasses.replace(kind, gpus=gpus, files=files)
                for storage in STORAGES:
                    if storage.one_copy:
                        continue
                    chosen = recommend(storage, 1, gigabytes * 1e9, "accelerator", here)
                    rows = predict(storage, 1, gigabytes * 1e9, "accelerator", here)
                    times = {row["strategy"]: row["seconds"] for row in rows}
                    if chosen != "striped":
                        row = {"links": name, "gpus": gpus, "gigabytes": gigabytes, "storage": storage.name}
                        found.append(row | {"fastest": chosen, "times": times})
    return found


def report(size: float, machine: Assumptions) -> dict[str, Any]:
    """All that is printed, as data."""
    rows, best = [], []
    for device in ("accelerator", "cpu"):
        for storage in STORAGES:
            for nodes in node_counts(storage):
                found = predict(storage, nodes, size, device, machine)
                rows += found
                chosen = {group: recommend(storage, nodes, size, device, machine, group) for group in GROUPS}
                top = {key: found[0][key] for key in ("device", "storage", "nodes", "strategy", "group", "seconds")}
                best.append(top | {"limit": found[0]["limit"]} | {f"best_for_{key}": chosen[key] for key in chosen})
    ring = dataclasses.replace(machine, status_ring=True)
    slow = [Load("broadcast", "all", STORAGES[2], nodes, size, "accelerator", ring) for nodes in NODES]
    return {
        "bytes": size,
        "assumptions": dataclasses.asdict(machine),
        "storages": [
            {key: None if value == math.inf else value for key, value in dataclasses.asdict(storage).items()}
            for storage in STORAGES
        ],
        "rows": rows,
        "recommended": best,
        "one_group": {
            device: {str(nodes): recommend_one_group(nodes, size, device, machine) for nodes in NODES[1:]}
            for device in ("accelerator", "cpu")
        },
        "deviations": deviations(size, machine),
        "published": published(),
        "shards": predict_shards(size, machine),
        "ring_status": {load.nodes: seconds(load) for load in slow},
    }


def _time(value: float) -> str:
    return f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def print_report(result: dict[str, Any], gpus: int) -> None:
    """Tables for people, in markdown."""
    print(f"# Modelled: {result['bytes'] / 1e9:g} GB onto nodes of {gpus} ranks\n")
    heads = [s if s == "independent" else f"{s}, {g}" for s, g in CHOICES]
    for device in ("accelerator", "cpu"):
        for storage in STORAGES:
            print(f"**{storage.title}, to {'accelerators' if device == 'accelerator' else 'CPU memory'}**\n")
            print("| nodes | " + " | ".join(heads) + " | fastest | its limit | a node's group | one group |")
            print("| ---: |" + " ---: |" * 5 + " --- |" * 4)
            for best in result["recommended"]:
                if (best["device"], best["storage"]) != (device, storage.name):
                    continue
                times = {
                    (row["strategy"], row["group"]): _time(row["seconds"])
                    for row in result["rows"]
                    if all(row[key] == best[key] for key in ("device", "storage", "nodes"))
                }
                cells = " | ".join(times.get(choice, "") for choice in CHOICES)
                chosen = "independent" if best["strategy"] == "independent" else f"{best['strategy']}, {best['group']}"
                advice = f"{best['best_for_node']} | {best['best_for_all']}"
                print(f"| {best['nodes']} | {cells} | {chosen} | {best['limit']} | {advice} |")
            print()
    print_shards(result["shards"], result["bytes"], _time)
    print("**One group over all nodes, whatever the storage (what `auto` does)**\n")
    print("| nodes | " + " | ".join(str(nodes) for nodes in NODES[1:]) + " |\n|" + " --- |" * len(NODES))
    for device, chosen in result["one_group"].items():
        print(f"| to {device} | " + " | ".join(chosen.values()) + " |")
    print("\n**Published and predicted**\n\n| what | published | predicted | ratio |\n| --- | ---: | ---: | ---: |")
    for row in result["published"]:
        print(f"| {row['what']} | {row['published_s']:.3g} s | {row['predicted_s']:.3g} s | {row['ratio']:.2f} |")
    print("\n**Accelerators of one node for which striped is not the fastest**\n")
    print("| links | GPUs | GB | storage | fastest | takes | striped takes |\n|" + " --- |" * 7)
    for row in result["deviations"]:
        fastest, striped = (f"{row['times'][name] * 1e3:.1f} ms" for name in (row["fastest"], "striped"))
        place = f"{row['links']} | {row['gpus']} | {row['gigabytes']:g} | {row['storage']}"
        print(f"| {place} | {row['fastest']} | {fastest} | {striped} |")
    last = max(result["ring_status"])
    print(f"\nWere the status of a block told in a ring (gloo's all-gather): {last} nodes, broadcast over all of them "
          f"from the parallel file system, {_time(result['ring_status'][last])}.\n")  # fmt: skip


def save_plot(result: dict[str, Any], path: Path) -> None:
    """A panel for each storage, time to accelerators over nodes; dashed: one group over all nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STORAGES), figsize=(3.6 * len(STORAGES), 3.8), sharey=True, squeeze=False)
    for axis, storage in zip(axes[0], STORAGES, strict=True):
        for strategy, group in CHOICES:
            points = [
                (row["nodes"], row["seconds"])
                for row in result["rows"]
                if (row["device"], row["storage"]) == ("accelerator", storage.name)
                and (row["strategy"], row["group"]) == (strategy, group)
            ]
            label = strategy if strategy == "independent" else f"{strategy}, {group}"
            style = "--" if group == "all" else "-"
            axis.loglog(*zip(*points, strict=True), style, marker=".", label=label, color=COLOURS[strategy])
        axis.set_title(storage.title, fontsize="small")
        axis.set_xlabel("nodes of 8 GPUs")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds (model)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=5, frameon=False, fontsize="small")
    figure.suptitle(f"Modelled, not measured: {result['bytes'] / 1e9:g} GB")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=140, help="size of the checkpoint (10^9 bytes)")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="draw a picture here (.png)")
    parser.add_argument("--check", action="store_true", help="measure, predict and run loads on this machine")
    parser.add_argument("--check-ranks", type=int, nargs="+", default=[1, 2, 4], help="ranks to check with")
    parser.add_argument("--check-gigabytes", type=float, default=1.0, help="size of the checkpoint that is loaded")
    options = parser.parse_args()
    sizes = (options.gigabytes, options.check_gigabytes)
    if not all(0 < size < math.inf for size in sizes):
        parser.error("--gigabytes must be a positive number")
    if min(options.check_ranks) < 1:
        parser.error("--check-ranks must be positive")
    machine = Assumptions()
    result = report(options.gigabytes * 1e9, machine)
    print_report(result, machine.gpus)
    if options.check:
        from scale.check import check, print_check

        result["check"] = check(options.check_ranks, options.check_gigabytes)
        print_check(result["check"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if options.plot:
        save_plot(result, options.plot)


if __name__ == "__main__":
    main()
