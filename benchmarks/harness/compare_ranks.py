"""Loads by several ranks at once, as scenarios of compare_loaders.py: benchmark_weight_loading_comparison.py's."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
from loaders.group_ways import PEER_WAYS, WAYS
from loaders.peers import BASELINE, MAPPED, OURS, PEERS, PRIVATE, environment, missing

SCRIPT = Path(__file__).parent.parent / "benchmark_weight_loading_comparison.py"
# Ways are compared with their like: on the CPU these map the files, all others have memory of their own.
MAPPING = ("python mapped", "weightload independent", "weightload auto")
OWNERS = {"python": BASELINE, "weightload": OURS, "fastsafetensors": "fastsafetensors", "run:ai": "run:ai streamer"}
PYTHON_BASELINES = {MAPPED: "python mapped", PRIVATE: "python broadcast"}


def run(loaded: tuple[int, int, int], ranks: int, options: argparse.Namespace, log: IO[bytes]) -> dict[str, Any]:
    """The result of that script, or the reason why there is none.

    It finds the files by the same path: ``loaded`` are the numbers of files, tensors and bytes that they must have.
    """
    device: torch.device = options.device
    why_not = {way: missing(PEERS[name], device) for way, name in PEER_WAYS.items()}
    ways = [way for way in [*WAYS, "python mapped", *PEER_WAYS] if not why_not.get(way)]
    if device.type != "cpu":
        ways = [way for way in ways if way not in ("python mapped", "weightload independent pread")]
    packages = [PEERS[name] for way, name in PEER_WAYS.items() if way in ways]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, SCRIPT,
            "--model-path", options.model_path, *(("--subfolder", options.subfolder) if options.subfolder else ()),
            "--device", device.type, "--warmup", options.warmup, "--repeats", options.repeats,
            "--ways", ",".join(ways), "--drop-failing",
            "--seed", options.seed, "--budget", options.budget, "--json", out,
        ]  # fmt: skip
        # Its distributed streaming is for NCCL only, unless it is told that another backend will do.
        environ = environment(*packages) | {"RUNAI_STREAMER_DIST": "1"}
        limit_s = 120 + 4 * options.budget
        try:
            with subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environ) as running:
                try:
                    code = running.wait(limit_s)
                except BaseException:
                    running.terminate()  # torchrun ends its ranks
                    raise
            if code:
                return {"ranks": ranks, "reason": f"the run of {ranks} ranks ended with code {code} (see --log)"}
        except subprocess.TimeoutExpired:
            return {"ranks": ranks, "reason": f"the run of {ranks} ranks took longer than {limit_s:.0f} s"}
        result: dict[str, Any] = json.loads(out.read_text())
    if (there := (result["files"], result["tensors"], result["bytes"])) != loaded:
        return {"ranks": ranks, "reason": f"(files, tensors, bytes) were {there} there, and {loaded} here"}
    result["dropped"] = {way: {"reason": reason, "wrong": None} for way, reason in why_not.items() if reason} | result[
        "dropped"
    ]
    return result


def scenarios(result: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Split the result of some ranks into scenarios: ways that map files apart from those with memory of their own."""
    ranks = result["ranks"]
    common = {"place": "disk", "cache": "warm", "ranks": ranks, "note": "; ".join(result.get("cache_remarks", ()))}
    if "rows" not in result:
        return [{**common, "kind": PRIVATE, "reason": result["reason"], "limits": [], "rows": []}]
    found = []
    for kind in (MAPPED, PRIVATE) if device.type == "cpu" else (PRIVATE,):
        rows = [row for row in result["rows"] if not row["limit"]]
        rows += [{"way": way, "seconds": []} for way in result["dropped"]]
        if device.type == "cpu":
            rows = [row for row in rows if (row["way"] in MAPPING) == (kind == MAPPED)]
        limits = [row for row in result["rows"] if row["limit"]]
        # One rank that reads every byte once: less than that no group with memory of its own can do.
        held = limits[0]["way"] if kind == PRIVATE else None
        found.append(
            {
                **common,
                "kind": kind if device.type == "cpu" else "device",
                "baseline": PYTHON_BASELINES[kind],
                "reason": None,
                "limits": [
                    {"limit": row["way"], **_seconds(row), "reason": None, "held_against": row["way"] == held}
                    for row in limits
                ],
                "rows": [_row(row, result["dropped"]) for row in rows],
            }
        )
    return found


def _seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {"seconds": row["seconds"], "heat_seconds": [], "dropped_after_heats": False}  # no heats there


def _row(row: dict[str, Any], dropped: dict[str, Any]) -> dict[str, Any]:
    owner = OWNERS[row["way"].split()[0]]
    return {
        "loader": row["way"],
        "of": owner,
        "version": None,
        **_seconds(row),
        "fresh_seconds": [],
        "cpu_seconds": [],
        "touch_seconds": [],
        "peak_bytes": None,
        "stats": None,
        "reason": None,
        "wrong": None,
        **dropped.get(row["way"], {}),
    }
