"""The statistics of a load count every byte where it passed, and name the bottleneck in words."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import evict, on_a_local_disk, write_tensors
from support.simulated import DEVICE

import weightload
from weightload import settings
from weightload._base.load_stats import FileStats, LoadStats, Stage
from weightload._load.progress import WeightsWithBar

MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        write_tensors(tmp_path / f"{file}.safetensors", [(f"{file}.{i}", "F32", [MIB // 4]) for i in range(count)])
        for file, count in (("large", 8), ("small", 3))
    ]


def drained(files: list[Path], **options: Any) -> LoadStats:
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, **options)
    assert len(list(weights)) == 11
    return weights.stats()


@pytest.mark.parametrize(("backend", "way"), [("mmap", "mapped"), ("pread", "buffered")])
def test_every_byte_is_counted_once(files: list[Path], backend: str, way: str) -> None:
    evict(files)
    with settings.override(read="buffered"):
        stats = drained(files, backend=backend)
    assert (stats.bytes, stats.tensors, stats.ended) == (11 * MIB, 11, True)
    assert [(file.path, file.bytes, file.read) for file in stats.files] == [
        (str(files[0]), 8 * MIB, way),
        (str(files[1]), 3 * MIB, way),
    ]
    assert stats.stages["read"].bytes == stats.bytes
    assert stats.stages["open"].bytes == sum(path.stat().st_size for path in files) - 11 * MIB
    assert stats.stages["parse"].seconds > 0
    assert 0 < stats.threads == stats.stages["read"].threads
    assert {"open", "parse", "setup", "read", "consumer"} <= set(stats.stages)


def test_cold_private_memory_is_read_directly_but_for_ranks_that_share_a_page_cache(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_a_local_disk(files[0]):
        pytest.skip("not on a local disk")
    evict(files)
    with settings.override(read="direct"):
        assert drained(files, backend="pread").direct_bytes > 7 * MIB
        evict(files)
        assert drained(files, backend="mmap").direct_bytes == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    evict(files)
    assert drained(files, backend="pread").direct_bytes == 0


def test_the_iterating_threads_time_adds_up(files: list[Path]) -> None:
    stats = drained(files, backend="pread")
    names = ("open", "setup", "wait", "consumer")
    parts = sum(stats.stages[name].seconds for name in names if name in stats.stages)
    assert parts == pytest.approx(stats.seconds)


def test_a_warm_mapping_too_small_to_start_threads_is_left_to_page_faults(files: list[Path]) -> None:
    for path in files:
        path.read_bytes()
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, names=["small.1"])
    list(weights)
    stats = weights.stats()
    assert (stats.bytes, stats.threads) == (MIB, 0)
    assert [file.read for file in stats.files] == ["left to page faults"] * 2
    assert "read" not in stats.stages
    assert stats.slowest_file is None


def test_a_load_that_is_left_counts_what_was_delivered(files: list[Path]) -> None:
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True)
    next(weights)
    begun = weights.stats()
    assert (begun.bytes, begun.tensors, begun.ended) == (MIB, 1, False)
    next(weights)
    weights.close()
    stats = weights.stats()
    assert (stats.bytes, stats.tensors, stats.ended) == (2 * MIB, 2, True)
    assert stats.seconds == weights.stats().seconds, "the clock has stopped"
    assert " so far" in str(begun)
    assert " so far" not in str(stats)


def test_with_a_bar_too(files: list[Path]) -> None:
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, show_progress=True)
    assert len(weights) == 11
    assert weights.total_bytes == 11 * MIB
    with weights:
        next(weights)
    assert weights.stats().tensors == 1
    assert weights.stats().ended


def test_a_load_with_a_bar_is_stopped_while_another_thread_waits_in_it(files: list[Path], arm: Any) -> None:
    """The load would take seconds: threads read no further than the next tensor before the consumer asks for it."""
    evict(files)
    with settings.override(task_bytes=MIB, window_bytes=MIB, threads=1):
        weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend="pread", show_progress=True)
        assert isinstance(weights, WeightsWithBar)
        next(weights)
        arm("delay", first=4, count=10**6, delay_ms=1500)
        taken: list[str] = []
        thread = threading.Thread(target=lambda: taken.extend(name for name, _ in weights))
        thread.start()
        weights.close()
        thread.join()
    assert len(taken) < 10
    assert weights.stats().ended


def test_load_into_reports_them_by_device(files: list[Path]) -> None:
    target = {f"large.{i}": torch.empty(MIB // 4) for i in range(8)}
    report = weightload.load_into(target, files[:1])
    assert report.stats["cpu"].bytes == report.bytes == 8 * MIB
    assert report.stats["cpu"].buffered_bytes == 8 * MIB


def test_on_an_accelerator(simulated: Any, files: list[Path]) -> None:
    evict(files)
    with settings.override(read="direct"):
        weights = weightload.safetensors_weights_iterator(files, device=DEVICE, strategy="independent")
        assert len(list(weights)) == 11
    stats = weights.stats()
    assert stats.device is not None
    assert stats.device.slots > 0
    assert stats.device.block_bytes >= 11 * MIB
    assert [file.read for file in stats.files] == ["direct"] * 2
    assert stats.stages["copy"].bytes == stats.direct_bytes == stats.bytes == 11 * MIB
    assert {"allocate", "copy", "read"} < set(stats.stages)


def made(seconds: float = 10.0, **stages: float) -> LoadStats:
    return LoadStats(
        seconds=seconds,
        ended=True,
        bytes=10**9,
        tensors=1,
        threads=4,
        stages={name: Stage(took, 2 * 10**9 if name == "read" else 0, 4, 4.0) for name, took in stages.items()},
        files=[],
        device=None,
    )


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            {"wait": 6, "consumer": 3, "read": 16},
            "reading, at 0.5 GB/s by 4 thread(s), kept the consumer waiting for 60%",
        ),
        ({"wait": 6, "consumer": 3, "read": 5, "pin_wait": 9}, "copying to the device"),
        ({"wait": 6, "consumer": 3, "read": 5, "allocate": 6}, "allocating memory on the device"),
        ({"wait": 6, "consumer": 3, "read": 5, "copy": 6}, "queueing copies"),
        ({"wait": 3, "consumer": 6, "read": 30}, "the consumer, between two tensors, took 60% of 10.00 s"),
        ({"wait": 1, "collective": 6, "consumer": 2, "read": 30}, "collectives, or ranks that were late"),
        ({"wait": 1, "consumer": 2, "read": 30, "open": 7}, "opening the files and checking their headers took 70%"),
        ({"wait": 1, "agreement": 8, "open": 1}, "waiting for one that was late for it, took 80%"),
        ({"wait": 1, "setup": 8, "open": 1}, "setting up"),
        ({"wait": 6, "consumer": 3, "read": 5, "pin": 9}, "page-locking memory kept the consumer waiting"),
        ({"wait": 6, "consumer": 3}, "reading kept the consumer waiting"),
        ({"consumer": 8}, "the consumer"),
        ({}, "nothing took any time"),
    ],
)
def test_the_bottleneck_is_where_most_of_the_time_went(stages: dict[str, float], words: str) -> None:
    assert words in made(**stages).bottleneck
    assert words in str(made(**stages))


def test_the_slowest_file_is_not_a_tiny_one() -> None:
    files = [
        FileStats("tiny", 0, 10, 0, 5.0),
        FileStats("fast", 10**9, 0, 0, 0.5),
        FileStats("slow", 0, 10**9, 10**9, 4.0),
        FileStats("untouched", 0, 0, 0, 0.0),
    ]
    stats = dataclasses.replace(made(wait=6, read=16), files=files)
    assert stats.slowest_file is files[2]
    assert "slow: 0.50 GB/s a thread, buffered and direct" in str(stats)
    assert "2 mapped" not in str(stats)


def test_for_json(files: list[Path]) -> None:
    values = json.loads(json.dumps(drained(files, backend="pread").as_dict()))
    assert values["files"][0]["read"] == "buffered"
    assert values["stages"]["read"]["bytes"] == values["bytes"] == 11 * MIB
    assert values["slowest_file"] in map(str, files)
    assert isinstance(values["bottleneck"], str)
