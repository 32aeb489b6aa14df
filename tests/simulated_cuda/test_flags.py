"""Loads under every shape and flag of CUDA that can be had here, each in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import run_script
from support.simulated import SMALL

BEGIN = f"""
import sys, threading
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
import torch, weightload
from conftest import write_tensors
from support.simulated import SMALL, assert_same, load
from weightload import settings, errors
from simulated_cuda import native as module
paths = [Path(path) for path in sys.argv[1:]]
native = module.load()
"""
LOADS = """
for small in (False, True):
    with settings.override(**(SMALL if small else {{}})):
        for read in ("buffered", "direct"):
            with settings.override(read=read):
                weights = load(*paths, device={device!r})
                assert_same(dict(weights), *paths, device={device!r})
                stats = weights.stats()
                if read == "direct":
                    assert stats.direct_bytes > 0 and stats.buffered_bytes == 0, stats
                assert stats.device.pageable_slots == 0
"""
assert SMALL


def run(script: str, paths: list[Path], **variables: str) -> str:
    import textwrap

    done = run_script(BEGIN + textwrap.dedent(script), *paths, env={**os.environ, **variables})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return str(done.stdout)


ALLOCATORS = [
    "expandable_segments:True",
    "backend:cudaMallocAsync",
    "pinned_use_cuda_host_register:True",
    "pinned_use_cuda_host_register:True,pinned_num_register_threads:4",
    "max_split_size_mb:32,garbage_collection_threshold:0.6",
    "pinned_use_background_threads:True",
    "roundup_power2_divisions:4",
]


@pytest.mark.parametrize("flags", ALLOCATORS)
def test_every_flag_of_the_allocators(mixed: list[Path], flags: str) -> None:
    """Direct reads work under all of them: also into what torch registers of malloc's, which is not page-aligned."""
    run(LOADS.format(device="cuda:0"), mixed, PYTORCH_ALLOC_CONF=flags)


def test_without_torchs_caching(mixed: list[Path]) -> None:
    run(LOADS.format(device="cuda:0"), mixed, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def test_into_a_pool_of_the_callers(mixed: list[Path]) -> None:
    script = """
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        got = dict(load(*paths, device="cuda:0"))
    assert_same(got, *paths, device="cuda:0")
    """
    run(script, mixed)


def test_visible_devices_in_another_order(mixed: list[Path]) -> None:
    script = """
    assert torch.cuda.get_device_name(0).endswith("1")
    assert_same(dict(load(*paths, device="cuda:0")), *paths, device="cuda:0")
    assert not native.has_context(1)
    """
    run(script, mixed, CUDA_VISIBLE_DEVICES="1,0")


def test_one_visible_device(mixed: list[Path]) -> None:
    script = """
    assert_same(dict(load(*paths, device="cuda")), *paths, device="cuda:0")
    try:
        load(*paths, device="cuda:1")
    except ValueError as error:
        print(error)
    """
    assert "cuda:1" in run(script, mixed, CUDA_VISIBLE_DEVICES="1")


def test_no_visible_device(mixed: list[Path]) -> None:
    script = """
    try:
        load(*paths, device="cuda:0")
    except ValueError as error:
        print(error)
    """
    assert "no accelerator" in run(script, mixed, CUDA_VISIBLE_DEVICES="")


def test_the_current_device_set_after_the_import(mixed: list[Path]) -> None:
    script = """
    torch.cuda.set_device(1)
    weights = weightload.safetensors_weights_iterator(paths)
    assert_same(dict(weights), *paths, device="cuda:1")
    assert torch.cuda.current_device() == 1
    assert not native.has_context(0)
    """
    run(script, mixed)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_in_a_thread_whose_current_device_is_another(mixed: list[Path], device: str) -> None:
    script = f"""
    failed = []
    def work():
        try:
            torch.cuda.set_device(1 - torch.device({device!r}).index)
            with settings.override(**SMALL):
                assert_same(dict(load(*paths, device={device!r})), *paths, device={device!r})
            assert torch.cuda.current_device() == 1 - torch.device({device!r}).index
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed, failed
    """
    run(script, mixed)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_context_on_the_loads_own_device_only(mixed: list[Path], device: str) -> None:
    """Every way to load, in a process whose current device is 0 and stays so."""
    script = f"""
    with settings.override(**SMALL):
        got = dict(load(*paths, device={device!r}))
        with load(*paths, device={device!r}) as weights:
            next(weights)
        weightload.load_into(got, paths)
        with weightload.safe_open(paths[0], device={device!r}) as handle:
            with handle.prefetch() as loader:
                dict(loader)
            handle.get_tensors()
        weightload.load_file(paths[0], {device!r})
        weightload.load(paths[0].read_bytes(), device={device!r})
    print(native.has_context(0), native.has_context(1))
    """
    assert run(script, mixed).split() == [str(device == "cuda:0"), str(device == "cuda:1")]


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_a_capture_under_way_is_a_clear_error(mixed: list[Path], mode: str) -> None:
    """A load fails while its thread captures a graph. The capture is not spoilt, and a load afterwards works."""
    script = f"""
    def file(): return weightload.load_file(paths[0], "cuda:0")
    def into(): return weightload.load_into({{name: tensor for name, tensor in got.items()}}, paths)
    def iterator(): return dict(load(*paths, device="cuda:0"))
    got = iterator()
    torch.cuda.synchronize()
    for call in (file, into, iterator):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(capture_error_mode={mode!r})
            try:
                call()
            except weightload.WeightLoadError as error:
                assert "being captured" in str(error), error
            else:
                raise AssertionError(call)
            try:
                graph.capture_end()
            except torch.AcceleratorError as error:  # graphs are not provided here
                assert "previous error" not in str(error), error
        torch.cuda.synchronize()
        assert_same(iterator(), *paths, device="cuda:0")
    """
    run(script, mixed)


def test_out_of_memory_near_the_limit(mixed: list[Path]) -> None:
    """A load may take what cudaMemGetInfo calls free. With less, an error names a tensor, and no harm is done."""
    script = """
    import gc
    path = paths[0].parent / "large.for.memory"
    write_tensors(path, [(f"{i}", "BF16", [1024, 1024]) for i in range(64)])
    size = 128 << 20
    torch.cuda.init()
    x = torch.empty(1, device="cuda")
    for spare, fits in ((64 << 20, True), (-32 << 20, False), (64 << 20, True)):
        gc.collect(); torch.cuda.synchronize(); native.empty_cache()
        native.limit_device_memory(native.used_bytes(0) + size + spare)
        free, total = torch.cuda.mem_get_info()
        assert free == size + spare, (free, size, spare)
        try:
            with settings.override(device_block_bytes=16 << 20):
                got = dict(load(path, device="cuda:0"))
            assert fits
            assert_same(got, path, device="cuda:0")
        except torch.OutOfMemoryError as error:
            assert not fits
            assert isinstance(error, errors.DeviceOutOfMemoryError) and error.tensor, error
            del error
        got = None
    path.unlink()
    """
    run(script, mixed)
