"""The accelerator path on a real GPU: what the simulated accelerator cannot show."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TESTS, thread_count, write_tensors
from support.simulated import SMALL, assert_same, load, raw, reference_of

import weightload
from weightload import errors, settings

pytestmark = pytest.mark.needs_gpu


@pytest.fixture(autouse=True)
def empty_afterwards(gpu: torch.device) -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("read", ["auto", "buffered", "direct"])
def test_parity(
    gpu: torch.device, all_dtypes: Path, mixed: list[Path], shards: list[Path], small: bool, read: str
) -> None:
    with settings.override(read=read, **(SMALL if small else {})):
        for paths in ([all_dtypes], mixed, shards):
            assert_same(dict(load(*paths, device=gpu)), *paths, device=str(gpu))


def test_every_call(gpu: torch.device, all_dtypes: Path) -> None:
    for device in (gpu, "cuda", "cuda:0", 0):
        assert_same(weightload.load_file(all_dtypes, device), all_dtypes, device="cuda:0")
    assert_same(weightload.load(all_dtypes.read_bytes(), device=gpu), all_dtypes, device="cuda:0")
    assert_same(dict(weightload.safetensors_weights_iterator([all_dtypes])), all_dtypes, device="cuda:0")


def busy(amount: int = 40) -> None:
    """Occupy the current stream, for some milliseconds each."""
    torch.cuda._sleep(amount * 5_000_000)


def test_use_and_drop_at_once_under_load(gpu: torch.device, mixed: list[Path]) -> None:
    reference = reference_of(*mixed)
    for _ in range(20):
        with settings.override(**SMALL):
            busy(4)
            copies = {name: tensor.clone() for name, tensor in load(*mixed, device=gpu)}
        for name, tensor in copies.items():
            assert torch.equal(raw(tensor), raw(reference[name])), name


def test_a_consumer_on_streams_of_its_own(gpu: torch.device, mixed: list[Path]) -> None:
    reference = reference_of(*mixed)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(10):
        with settings.override(**SMALL):
            weights, copies = load(*mixed, device=gpu), {}
            for number in range(len(weights)):
                with torch.cuda.stream(streams[number % 3]):
                    if number % 50 == 0:
                        busy(2)
                    name, tensor = next(weights)
                    copies[name] = tensor.clone()
                    del tensor
        torch.cuda.synchronize()
        for name, tensor in copies.items():
            assert torch.equal(raw(tensor), raw(reference[name])), name


def test_the_host_does_not_wait_for_the_device(gpu: torch.device, shards: list[Path]) -> None:
    """All tensors are there while the stream that owns their memory is still busy."""
    dict(load(*shards, device=gpu))
    torch.cuda.synchronize()
    busy()
    done = torch.cuda.Event()
    done.record()
    got = dict(load(*shards, device=gpu))
    assert not done.query()
    assert_same(got, *shards, device=str(gpu))


def test_leaving_early_frees_everything(gpu: torch.device, shards: list[Path]) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    for taken in (0, 1, 30):
        with settings.override(**SMALL), load(*shards, device=gpu) as weights:
            for _ in range(taken):
                next(weights)
        del weights
        gc.collect()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert thread_count() == 0


def test_memory_beyond_the_tensors(gpu: torch.device, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "t.safetensors", [(f"{i}", "BF16", [4096, 1031]) for i in range(120)])
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = weightload.load_file(path, gpu)
    size = sum(tensor.nbytes for tensor in got.values())
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * size + settings.current().device_block_bytes


def test_out_of_memory_is_an_error_and_less_works(gpu: torch.device, shards: list[Path]) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (16 << 20)) / total)
        with settings.override(device_block_bytes=1 << 20), pytest.raises(torch.OutOfMemoryError) as caught:
            dict(load(*shards, device=gpu))
        assert isinstance(caught.value, errors.DeviceOutOfMemoryError)
        assert caught.value.tensor in reference_of(*shards)
        del caught
        gc.collect()
        assert_same(dict(load(shards[0], device=gpu)), shards[0], device=str(gpu))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_load_into_a_module(gpu: torch.device, tmp_path: Path) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(20)])
    import safetensors.torch

    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(20)]).to(gpu, dtype)
        before = [parameter.data_ptr() for parameter in target.parameters()]
        busy(4)
        report = weightload.load_into(target, tmp_path / "m.safetensors")
        assert report.in_place == (40 if dtype == torch.float32 else 0)
        assert before == [parameter.data_ptr() for parameter in target.parameters()]
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor.cpu(), model.state_dict()[name].to(dtype)), name


def test_ranks_that_share_the_gpu_over_nccl(gpu: torch.device, mixed: list[Path], tmp_path: Path) -> None:
    """Records of the agreement take the GPU too; every byte is compared."""
    script = ROOT / "benchmarks" / "gpu/ranks.py"
    ways = "weightload broadcast,weightload striped"
    command = [
        sys.executable, script, "--model-path", mixed[0].parent, "--ranks", 2, "--backends", "nccl", "--ways", ways,
        "--repeats", 1, "--limit-s", 60, "--scratch", tmp_path, "--json", tmp_path / "r.json",
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=110, cwd=ROOT)
    result = json.loads((tmp_path / "r.json").read_text())
    (run,) = result["runs"]
    if run["reason"] and not run["failed"]:
        pytest.skip(run["reason"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert run["result"]["identical_bytes"]
    assert not result["unproven"]


def test_boxes(gpu: torch.device, mixed: list[Path]) -> None:
    """Rows and columns, read piece by piece into slots."""
    reference = reference_of(*mixed)

    def half(name: str, shape: tuple[int, ...], *_: object) -> tuple[slice, ...] | None:
        return (*[slice(None)] * (len(shape) - 1), slice(shape[-1] // 2, None)) if shape else None

    for small in ({}, SMALL):
        with settings.override(**small):
            got = dict(weightload.safetensors_weights_iterator(mixed, device=gpu, shard=half))
        assert set(got) == set(reference)
        for name, tensor in got.items():
            expected = reference[name]
            expected = expected[..., expected.shape[-1] // 2 :] if expected.dim() else expected
            assert torch.equal(raw(tensor), raw(expected.contiguous())), name


def test_from_a_server(gpu: torch.device, mixed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By requests into page-locked slots."""
    pytest.importorskip("obstore")
    monkeypatch.syspath_prepend(TESTS / "remote")
    from servers import serving

    with serving(mixed[0].parent) as web:
        addresses = [web.address(path.name) for path in mixed]
        assert_same(dict(weightload.safetensors_weights_iterator(addresses, device=gpu)), *mixed, device=str(gpu))
        for address, path in zip(addresses, mixed, strict=True):
            assert_same(weightload.load_file(address, gpu), path, device=str(gpu))


def test_ahead_of_slices(gpu: torch.device, mixed: list[Path]) -> None:
    """Load slices like transformers: first ask for all of them, then take one after the other from several threads."""
    from concurrent.futures import ThreadPoolExecutor

    from weightload._install.read_ahead import SafeOpen

    for path in mixed:
        reference = reference_of(path)
        with SafeOpen(path, framework="pt") as handle, ThreadPoolExecutor(4) as pool:
            slices = {name: handle.get_slice(name) for name in sorted(reference)}
            for one in slices.values():
                one.will_be_wanted(gpu)
            got = dict(zip(slices, pool.map(lambda one: one.to(gpu), slices.values()), strict=True))
        busy(2)
        for name, tensor in got.items():
            assert torch.equal(raw(tensor), raw(reference[name])), name
            assert tensor.nbytes <= 4096 or tensor.untyped_storage().nbytes() == tensor.nbytes, name
