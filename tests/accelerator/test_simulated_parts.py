"""Parts of tensors on an accelerator: in its memory, and in the order, that whole ones have."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEED, evict, write_tensors
from support.parts import cut
from support.simulated import DEVICE, KIND, SMALL, raw, reference_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import weightload
from weightload import _C, errors, settings

pytestmark = pytest.mark.simulated

SHAPES = {
    "rows": [300, 64],
    "columns": [300, 64],
    "deep": [6, 40, 32],
    "wide": [4, 60_000],  # pieces of more than a slot
    "scalar": [],
    "last": [512, 512],
}
BOXES: dict[str, Any] = {
    "rows": (slice(100, 200),),
    "columns": (slice(None), slice(16, 32)),
    "deep": (slice(1, 5), slice(3, 39), [(20, 24), (1, 3)]),
    "wide": (slice(None), slice(30_000, 60_000)),
    "scalar": None,
    "last": (slice(0, 512), slice(0, 256)),
}


def load(path: Path, boxes: dict[str, Any]) -> dict[str, torch.Tensor]:
    return dict(weightload.safetensors_weights_iterator(path, device=DEVICE, shard=lambda name, *_: boxes[name]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tensors(tmp_path / "m.safetensors", [(name, "F32", shape) for name, shape in SHAPES.items()])


@pytest.mark.parametrize("cold", [False, True])
def test_boxes_are_yielded_in_device_memory(cold: bool, simulated: Any, path: Path) -> None:
    chance = random.Random(SEED)
    whole = reference_of(path)
    for _ in range(6):
        boxes = {name: chance.choice([box, box, False]) for name, box in BOXES.items()}
        if cold:
            evict([path])
        with settings.override(**SMALL):
            got = load(path, boxes)
        assert list(got) == [name for name in SHAPES if boxes[name] is not False]
        for name, tensor in got.items():
            expected = cut(whole[name], boxes[name])
            assert (tensor.shape, str(tensor.device)) == (expected.shape, DEVICE)
            assert torch.equal(raw(tensor), raw(expected.contiguous())), name
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 256 == 0


@pytest.mark.parametrize("fault", ["short_read", "interrupt"])
def test_reads_of_pieces_that_are_cut_short_go_on(fault: str, simulated: Any, path: Path) -> None:
    whole = reference_of(path)
    _C.arm_fault(fault, count=100)
    try:
        got = load(path, BOXES)
    finally:
        _C.disarm_fault()
    for name, tensor in got.items():
        assert torch.equal(raw(tensor), raw(cut(whole[name], BOXES[name]).contiguous())), name


def test_a_piece_that_cannot_be_read_names_its_tensor(simulated: Any, path: Path) -> None:
    boxes = {name: name == "columns" and box for name, box in BOXES.items()}
    try:
        with settings.override(**{**SMALL, "threads": 1}):
            _C.arm_fault("delay", first=1 << 60)
            load(path, boxes)
            _C.arm_fault("error", first=_C.reads_since_armed() - 1, error_number=errno.EIO)
            with pytest.raises(errors.ReadError) as caught:
                load(path, boxes)
    finally:
        _C.disarm_fault()
    assert (caught.value.tensor, caught.value.errno) == ("columns", errno.EIO)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_shards_in_device_memory_are_read_into(placement: Any, simulated: Any, path: Path) -> None:
    whole = reference_of(path)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh(KIND, (2,))
        target, expected = {}, {}
        for name in ("rows", "columns", "wide", "last"):
            expected[name] = whole[name].chunk(2, placement.dim)[1]
            local = torch.zeros(expected[name].shape, device=DEVICE)
            stride = whole[name].stride()
            target[name] = DTensor.from_local(
                local, mesh, [placement], run_check=False, shape=whole[name].shape, stride=stride
            )
        with settings.override(**SMALL):
            report = weightload.load_into(target, path, strict=False)
        assert report.in_place == len(target)
        assert report.bytes == sum(tensor.nbytes for tensor in expected.values())
        for name, tensor in target.items():
            assert torch.equal(raw(tensor.to_local()), raw(expected[name].contiguous())), name
        # These tensors must be gone before the simulation looks for what is in use.
        del target, local, tensor
    finally:
        dist.destroy_process_group()
