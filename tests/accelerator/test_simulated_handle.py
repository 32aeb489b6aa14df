"""Handles whose device is an accelerator: single tensors, slices, prefetch, load_model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import BACKENDS, write_tensors
from support.simulated import DEVICE, SMALL, assert_same, current_stream, raw, reference_of

import weightload
from weightload import _C, errors, settings

pytestmark = pytest.mark.simulated


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors on both sides of what the pipeline takes over."""
    tensors = [
        ("large", "F32", [900, 700]),
        ("small", "I16", [40, 3]),
        ("bool", "BOOL", [700, 2000]),
        ("one", "F64", []),
    ]
    tensors += [(f"{i}", "BF16", [100, 100]) for i in range(50)]
    return write_tensors(tmp_path_factory.mktemp("handle") / "h.safetensors", tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor(simulated: Any, all_dtypes: Path, path: Path, backend: Any) -> None:
    for file in (all_dtypes, path):
        with weightload.safe_open(file, device=DEVICE, backend=backend) as handle, settings.override(**SMALL):
            got = {name: handle.get_tensor(name) for name in handle}
            reference = reference_of(file)
            assert sorted(got) == sorted(reference)
            for name, tensor in got.items():
                assert str(tensor.device) == DEVICE
                assert (tensor.dtype, tensor.shape) == (reference[name].dtype, reference[name].shape)
                assert torch.equal(raw(tensor), raw(reference[name])), name
            assert_same(handle.get_tensors(), file)
        del got


@pytest.mark.parametrize("name", ["large", "small", "bool"])
def test_slices(simulated: Any, path: Path, name: str) -> None:
    reference = reference_of(path)[name]
    with weightload.safe_open(path, device=torch.device(DEVICE)) as handle:
        part = handle.get_slice(name)
        for index in (slice(None), slice(3, 39), slice(0, None, 7), -1, (slice(2, 30), slice(1, 3)), (..., 0), (4, 1)):
            got, want = part[index], reference[index]
            assert (str(got.device), got.dtype, got.shape) == (DEVICE, want.dtype, want.shape)
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
            assert torch.equal(got.view(bits).cpu(), want.view(bits)), index
            del got


def test_prefetch(simulated: Any, path: Path) -> None:
    reference = reference_of(path)
    with settings.override(**SMALL):
        with weightload.safe_open(path) as handle:
            loader = handle.prefetch({"large": slice(10, 700), "bool": slice(-3, None), "7": None}, device=DEVICE)
        got = {"7": loader.take("7"), **dict(loader)}
        loader.close()
    assert torch.equal(raw(got["large"]), raw(reference["large"][10:700]))
    assert torch.equal(raw(got["bool"]), raw(reference["bool"][-3:]))
    assert torch.equal(raw(got["7"]), raw(reference["7"]))
    del got


def test_a_tensor_that_came_on_one_stream_is_taken_on_another(simulated: Any, path: Path) -> None:
    reference = reference_of(path)
    other = torch.Stream(DEVICE)
    with settings.override(**SMALL), weightload.safe_open(path, device=DEVICE) as handle:
        for _ in range(20):
            with handle.prefetch() as loader:
                loader.take("49")  # brings in the others on the stream that is current here, "48" just before it
                with current_stream(other):
                    host = raw(loader.take("48"))
                    assert torch.equal(host, raw(reference["48"]))
                    for name, tensor in loader:
                        assert torch.equal(raw(tensor), raw(reference[name])), name
                        del tensor


def test_prefetch_runs_ahead_of_the_consumer(simulated: Any, path: Path, arm: Any) -> None:
    """To the end of the plan, where an iterator stays a block ahead."""
    arm("delay", count=0)
    with settings.override(**SMALL), weightload.safe_open(path, device=DEVICE) as handle:
        with handle.prefetch() as loader:
            total = path.stat().st_size // SMALL["slot_bytes"]
            while _C.reads_since_armed() < total:
                simulated.synchronize(0)
            assert len(dict(loader)) == len(reference_of(path))


def test_errors(simulated: Any, path: Path, arm: Any) -> None:
    with weightload.safe_open(path, device=DEVICE) as handle:
        for name in ("large", "small"):
            arm("error", count=10**6, error_number=5)
            with pytest.raises(errors.ReadError) as caught:
                handle.get_tensor(name)
            _C.disarm_fault()
            assert (caught.value.errno, caught.value.tensor, caught.value.filename) == (5, name, str(path))
        with pytest.raises(IndexError):
            handle.get_slice("large")[900]
    del caught


def test_load_model(simulated: Any, tmp_path: Path) -> None:
    source = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.Linear(400, 3))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "m.safetensors")
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.Linear(400, 3)).to(DEVICE)
    assert weightload.load_model(model, tmp_path / "m.safetensors", device=DEVICE) == (set(), [])
    state = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name])
    del model, tensor


def test_slices_that_come_ahead_take_little_memory_in_any_order(
    simulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken in another order than the file's, and dropped: what waits for its turn is bounded, and each comes once."""
    from weightload._install import read_ahead

    path = write_tensors(tmp_path / "t.safetensors", [(f"{i:02}", "F32", [256, 1024]) for i in range(64)])
    reference = reference_of(path)
    asked: list[str] = []
    start = read_ahead.start_prefetch

    def watched(reader: Any, plan: dict[str, None], *arguments: Any, **options: Any) -> Any:
        asked.extend(plan)
        return start(reader, plan, *arguments, **options)

    monkeypatch.setattr(read_ahead, "start_prefetch", watched)
    monkeypatch.setattr(read_ahead, "PILE", 8 << 20)
    device = torch.device(DEVICE)
    for order in (sorted(reference), sorted(reference, reverse=True)):
        asked.clear()
        simulated.reset_peak(0)
        with settings.override(**SMALL), read_ahead.SafeOpen(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in order}
            for one in slices.values():
                one.will_be_wanted(device)
            for name, one in slices.items():
                assert torch.equal(raw(one.to(device)), raw(reference[name]))
        assert sorted(asked) == sorted(reference)
        assert simulated.peak_bytes(0) <= 12 << 20


def test_slices_come_one_by_one_where_memory_runs_out(simulated: Any, tmp_path: Path) -> None:
    from weightload._install import read_ahead

    path = write_tensors(tmp_path / "t.safetensors", [(f"{i:02}", "F32", [256, 1024]) for i in range(16)])
    reference = reference_of(path)
    device = torch.device(DEVICE)
    with settings.override(**SMALL), read_ahead.SafeOpen(path, framework="pt") as handle:
        slices = {name: handle.get_slice(name) for name in sorted(reference, reverse=True)}
        for one in slices.values():
            one.will_be_wanted(device)
        simulated.limit_device_memory(6 << 20)
        for name, one in slices.items():
            assert torch.equal(raw(one.to(device)), raw(reference[name]))
