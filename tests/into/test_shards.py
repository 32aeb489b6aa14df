"""Parts of tensors: DTensors get their shards, ``shard=`` gives the iterator boxes, and no more is read than that."""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import DTYPE_BITS, SEED, write_tensors
from support.parts import cut, empty_like, random_placements, rank_of, untouched_like
from support.ranks.groups import assert_done, run_ranks
from support.simulated import raw
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import weightload
from weightload import _C, errors, settings
from weightload._base.dtypes import TORCH_DTYPES
from weightload._checkpoint.selection import open_files
from weightload._load.devices import CPU
from weightload._load.start import Reading, Source, start
from weightload._parts.shards import part_of_rank

MESHES = [(2,), (3,), (4,), (2, 2), (2, 3), (2, 2, 2)]


@pytest.mark.parametrize("task_bytes", [None, 4096])
@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_shards_are_what_distribute_tensor_deals_out(
    mesh_shape: tuple[int, ...], task_bytes: int | None, tmp_path: Path
) -> None:
    """Any placements, uneven and empty shards, all sizes of elements."""
    chance = random.Random(SEED + math.prod(mesh_shape))
    for number in range(12):
        whole, target, expected = {}, {}, {}
        with rank_of(mesh_shape, chance.randrange(math.prod(mesh_shape))) as mesh:
            for name in "abcdefgh":
                shape = tuple(chance.choice([1, 2, 3, 5, 8, 16, 33]) for _ in range(chance.randrange(4)))
                dtype = chance.choice([torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.complex64])
                whole[name] = torch.randint(0, 200, shape).to(dtype)
                placements = random_placements(chance, len(shape), mesh_shape)
                shard = distribute_tensor(whole[name], mesh, placements, src_data_rank=None)
                expected[name], target[name] = shard.to_local().clone(), empty_like(shard)
            path = tmp_path / f"{number}.safetensors"
            safetensors.torch.save_file(whole, path)
            with settings.override(**({"task_bytes": task_bytes} if task_bytes else {})):
                report = weightload.load_into(target, path)
            for name, tensor in target.items():
                words = f"{name}: {tensor.placements} of {tuple(tensor.shape)}, rank {dist.get_rank()}"
                assert torch.equal(tensor.to_local(), expected[name]), words
            assert report.bytes == sum(tensor.nbytes for tensor in expected.values())
            assert report.in_place == len(target)
            assert sorted(report.loaded) == list("abcdefgh")


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPE_BITS if dtype in TORCH_DTYPES])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(-1)], ids=str)
def test_shards_of_every_dtype(dtype: str, placement: Any, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("before", "U8", [3]), ("x", dtype, [8, 6, 4])], seed=1)
    with rank_of((2,), 1) as mesh:
        whole = weightload.load_file(path)["x"]
        first, last = ((slice(4, 8), slice(None)), (slice(None), slice(3, 6)))[placement.dim == 1], slice(None)
        if placement.dim == -1:
            first, last = (slice(None), slice(None)), slice(whole.shape[-1] // 2, None)
        expected = whole.view(torch.uint8).view(*whole.shape, -1)[(*first, last)].contiguous()
        local = torch.zeros(expected.shape, dtype=torch.uint8).view(whole.dtype).view(expected.shape[:3])
        stride = torch.empty(whole.shape, device="meta").stride()
        shard = DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=stride)
        weightload.load_into({"x": shard}, path, strict=False)
        assert torch.equal(local.view(torch.uint8).view(expected.shape), expected)


def test_a_rank_outside_of_the_mesh_has_nothing_to_load(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    with rank_of((4,), 3):
        mesh = dist.DeviceMesh("cpu", [0, 1])
        shard = DTensor.from_local(torch.empty(0), mesh, [Shard(0)], run_check=False, shape=(4, 4), stride=(4, 1))
        report = weightload.load_into({"x": shard}, tmp_path / "m.safetensors")
        assert report.loaded == ["x"]
        assert report.bytes == 0


def test_a_replica_has_all_of_the_tensor_or_nothing(tmp_path: Path) -> None:
    """Bytes behind a memory that is too small are somebody else's."""
    safetensors.torch.save_file({"x": torch.ones(4, 4), "y": torch.ones(())}, tmp_path / "m.safetensors")
    with rank_of((4,), 3):
        others = dist.DeviceMesh("cpu", [0, 1])
        target = {
            "x": distribute_tensor(torch.zeros(4, 4), others, [Replicate()], src_data_rank=None),
            "y": distribute_tensor(torch.zeros(()), others, [Replicate()], src_data_rank=None),
        }
        assert sorted(weightload.load_into(target, tmp_path / "m.safetensors").loaded) == ["x", "y"]
    with rank_of((2,), 0) as mesh:
        memory = torch.zeros(16)
        small = DTensor.from_local(
            memory[:4].view(2, 2), mesh, [Replicate()], run_check=False, shape=(4, 4), stride=(4, 1)
        )
        with pytest.raises(errors.StateDictError, match="it has"):
            weightload.load_into({"x": small}, tmp_path / "m.safetensors", strict=False)
        assert not memory.any()


def test_a_place_that_is_too_small_is_no_place(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("x", "F32", [4, 4])])
    files = open_files([path])
    with pytest.raises(errors.WeightLoadError, match="smaller than it"):
        start(Source.of(files), CPU, reading=Reading("pread"), places=[torch.zeros(15)])


def test_values_of_another_dtype_are_cast(tmp_path: Path) -> None:
    whole = torch.arange(48, dtype=torch.float32).view(6, 8)
    safetensors.torch.save_file({"x": whole}, tmp_path / "m.safetensors")
    for placement, mine in ((Shard(0), whole[3:]), (Shard(1), whole[:, 4:])):
        with rank_of((2,), 1) as mesh:
            target = empty_like(distribute_tensor(whole.bfloat16(), mesh, [placement], src_data_rank=None))
            report = weightload.load_into({"x": target}, tmp_path / "m.safetensors")
            assert torch.equal(target.to_local(), mine.bfloat16())
            assert report.in_place == 0


def test_what_holds_no_shard_is_refused_before_any_byte(tmp_path: Path) -> None:
    whole = {"plain": torch.ones(4), "x": torch.ones(4, 4)}
    safetensors.torch.save_file(whole, tmp_path / "m.safetensors")
    with rank_of((2,), 0) as mesh:
        local = torch.zeros(4, 4)
        sums = DTensor.from_local(local, mesh, [Partial()], run_check=False)
        short = DTensor.from_local(torch.zeros(1, 4), mesh, [Shard(0)], run_check=False, shape=(4, 4), stride=(4, 1))
        wrong = DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)], run_check=False)
        for tensor, words in ((sums, "neither Shard nor Replicate"), (short, "it has"), (wrong, "size mismatch")):
            target = {"plain": torch.zeros(4), "x": tensor}
            with pytest.raises(errors.StateDictError, match=words) as caught:
                weightload.load_into(target, tmp_path / "m.safetensors")
            assert "'x'" in str(caught.value) or " x:" in str(caught.value)
            assert not target["plain"].any()
        assert not local.any()


def test_a_module_that_loads_itself_gets_no_shards(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    model[0].register_load_state_dict_pre_hook(lambda *_: None)
    with rank_of((2,), 0) as mesh:
        fully_shard(model[0], mesh=mesh)
        with pytest.raises(errors.StateDictError, match="takes part in its own loading"):
            weightload.load_into(model, tmp_path / "m.safetensors")


PADDED = """
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
import safetensors.torch

path, odd = sys.argv[4], 7.0
model = nn.Linear(3, 5)
fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
rows = [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)][rank]
shards = {name: tensor.to_local() for name, tensor in model.named_parameters()}
storages = {name: torch.empty(0).set_(tensor.untyped_storage()) for name, tensor in shards.items()}
for storage in storages.values():
    storage.fill_(odd)
weightload.load_into(model, path)
for name, whole in safetensors.torch.load_file(path).items():
    shard, storage = shards[name], storages[name]
    assert torch.equal(shard, whole[rows]), (name, shard, whole[rows])
    begin = shard.storage_offset()
    behind = torch.cat([storage[:begin], storage[begin + shard.numel() :]])
    assert len(behind) > 0 or rank < 2
    assert (behind == odd).all(), (name, behind)
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_only_the_shard_of_a_padded_parameter_is_written(tmp_path: Path) -> None:
    """FSDP2 pads what does not divide; what is behind the shard is none of it."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.rand(5, 3), "bias": torch.rand(5)}, path)
    assert_done(run_ranks(PADDED, 4, tmp_path, path))


@pytest.mark.parametrize("names", [["weight"], ["weight", "bias", "surplus"]])
def test_names_of_a_module_of_fsdp_are_judged_before_any_byte(names: list[str], tmp_path: Path) -> None:
    """Its own hooks after loading forgive none."""
    path = tmp_path / "m.safetensors"
    sizes = {"weight": (5, 3), "bias": (5,), "surplus": (1,)}
    safetensors.torch.save_file({name: torch.rand(sizes[name]) + 1 for name in names}, path)
    with rank_of((2,), 0) as mesh:
        model = nn.Linear(3, 5)
        fully_shard(model, mesh=mesh)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.zero_()
        with pytest.raises(errors.StateDictError) as caught:
            weightload.load_into(model, path)
        assert "partly loaded" not in str(caught.value)
        assert not any(tensor.to_local().any() for tensor in model.parameters())  # type: ignore[attr-defined]
        weightload.load_into(model, path, strict=False)
        assert model.weight.to_local().all()  # type: ignore[operator]


def test_autograd_is_told(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    with rank_of((2,), 0) as mesh:
        shard = empty_like(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)], src_data_rank=None))
        before = shard._version, shard.to_local()._version
        weightload.load_into({"x": shard}, tmp_path / "m.safetensors")
        assert shard._version > before[0]
        assert shard.to_local()._version > before[1]


def test_tied_shards_are_read_once(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(8, 4), "b": torch.full((8, 4), 2.0)}, tmp_path / "m.safetensors")
    with rank_of((2,), 1) as mesh:
        shard = empty_like(distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)], src_data_rank=None))
        report = weightload.load_into({"a": shard, "b": shard}, tmp_path / "m.safetensors")
        assert (shard.to_local() == 2).all()
        assert sum(file.bytes for file in report.stats["cpu"].files) == shard.to_local().nbytes


def bytes_read(report: Any) -> int:
    return sum(file.bytes for file in report.stats["cpu"].files)


@pytest.mark.parametrize(
    ("shape", "placement", "most"),
    [
        ((512, 1024), Shard(0), 1.0),
        ((64, 16384), Shard(1), 1.0),  # pieces of 8 KiB, 24 KiB apart
        ((512, 512), Shard(1), 1.0),  # pieces of 256 bytes in rows of 1 KiB: four times as much lies there
        ((16, 512 << 10), Shard(1), 1.0),  # pieces of 256 KiB
        ((4, 64, 4096), Shard(1), 1.0),
    ],
)
def test_no_more_is_read_than_the_shard(shape: tuple[int, ...], placement: Any, most: float, tmp_path: Path) -> None:
    whole = torch.randint(0, 1000, shape, dtype=torch.int16)
    safetensors.torch.save_file({"x": whole}, tmp_path / "m.safetensors")
    with rank_of((4,), 2) as mesh:
        shard = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        target = empty_like(shard)
        report = weightload.load_into({"x": target}, tmp_path / "m.safetensors")
        assert torch.equal(target.to_local(), shard.to_local())
        wanted = shard.to_local().nbytes
        assert wanted <= bytes_read(report) <= most * wanted


def test_halves_of_short_rows_are_read_with_what_is_between(tmp_path: Path) -> None:
    """A read costs as much as copying 8 KiB: at most twice the shard."""
    whole = torch.randint(0, 1000, (5000, 512), dtype=torch.int16)
    safetensors.torch.save_file({"x": whole}, tmp_path / "m.safetensors")
    for rank in (0, 1):
        with rank_of((2,), rank) as mesh:
            shard = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)
            target = untouched_like(shard)
            report = weightload.load_into({"x": target}, tmp_path / "m.safetensors")
            assert torch.equal(target.to_local(), shard.to_local())
            assert bytes_read(report) <= 2 * shard.to_local().nbytes
            # Few reads, of many rows each: nearly all that lies between the first and the last piece.
            assert bytes_read(report) > 1.9 * shard.to_local().nbytes


class Interleaved(Shard):
    """To torch equal to a Shard, and dealt out in a way of its own."""


def test_kinds_of_shards_that_pass_for_others_are_refused_whatever_was_seen_before(tmp_path: Path) -> None:
    safetensors.torch.save_file({name: torch.arange(8.0).reshape(8, 1) for name in "ab"}, tmp_path / "m.safetensors")

    def shard(placement: Shard) -> DTensor:
        return DTensor.from_local(
            torch.zeros(4, 1), mesh, [placement], run_check=False, shape=torch.Size((8, 1)), stride=(1, 1)
        )

    with rank_of((2,), 1) as mesh:
        for target in ({"b": shard(Interleaved(0))}, {"a": shard(Shard(0)), "b": shard(Interleaved(0))}):
            for _ in range(2):
                with pytest.raises(errors.StateDictError, match=r"'b'.*neither Shard nor Replicate"):
                    weightload.load_into(target, tmp_path / "m.safetensors", strict=False)
        weightload.load_into({"a": target["a"]}, tmp_path / "m.safetensors", strict=False)


def test_load_model_sends_dtensors_to_load_into(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(4, 2)}, tmp_path / "m.safetensors")
    with rank_of((2,), 1) as mesh:
        model = nn.Linear(2, 4, bias=False)
        model.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)], src_data_rank=None))
        with pytest.raises(errors.StateDictError, match="takes no DTensors, as 'weight' is one; load_into") as raised:
            weightload.load_model(model, tmp_path / "m.safetensors")
    assert raised.value.tensor == "weight"
    assert raised.value.filename == str(tmp_path / "m.safetensors")


def test_dealing_is_that_of_chunk() -> None:
    assert part_of_rank((5,), (4,), (3,), (Shard(0),)) == ((),)
    assert part_of_rank((5,), (4,), (2,), (Shard(0),)) == (((4, 5),),)
    assert part_of_rank((8,), (2, 2), (0, 1), (_StridedShard(0, split_factor=2), Shard(0))) == (((4, 6),),)
    assert part_of_rank((8, 4), (2, 2), (1, 1), (Shard(0), Shard(1))) == (((4, 8),), ((2, 4),))


TWO_DIMENSIONS = """
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import safetensors.torch

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(10, 24), nn.Linear(24, 10), nn.Linear(10, 7)
    def forward(self, x):
        return self.head(x + self.down(torch.relu(self.up(x))))

path = sys.argv[4]
torch.manual_seed(1)
x = torch.rand(3, 10)
plain = Net()
weightload.load_into(plain, path)
expected = plain(x)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
torch.manual_seed(2 + rank)
for kind in ("fsdp", "tp", "both"):
    model = Net()
    if kind != "fsdp":
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind != "tp":
        over = mesh["dp"] if kind == "both" else init_device_mesh("cpu", (4,))
        for part in (model.down, model):
            fully_shard(part, mesh=over, reshard_after_forward=False)
    for again in range(2):  # the second time with what a forward has gathered
        weightload.load_into(model, path)
        torch.testing.assert_close(model(x), expected, msg=lambda text: f"{kind}, {again}: {text}")
        with torch.no_grad():
            state = model.state_dict()  # goes back to the shards
            for tensor in state.values():
                tensor.mul_(0)
            model(x)
# What is shared between ranks by strategy is read by each for itself where there are shards: gathered or buffers only.
model = Net()
fully_shard(model, mesh=init_device_mesh("cpu", (4,)), reshard_after_forward=False)
weightload.load_into(model, path)
model(x)
weightload.load_into(model, path, group=dist.group.WORLD, strategy="striped")
torch.testing.assert_close(model(x), expected)
model = Net()
rows = torch.distributed.tensor.distribute_tensor(torch.zeros(24, 10), mesh, [torch.distributed.tensor.Shard(0)] * 2)
del model.up.weight
model.up.register_buffer("weight", rows)
weightload.load_into(model, path, group=dist.group.WORLD, strategy="striped")
assert torch.equal(rows.full_tensor(), safetensors.torch.load_file(path)["up.weight"])
# Tied weights whose shards have no elements on some ranks.
tied = nn.Sequential(nn.Linear(10, 2, bias=False), nn.Linear(10, 2, bias=False))
tied[1].weight = tied[0].weight
fully_shard(tied, mesh=init_device_mesh("cpu", (4,)))
if rank == 0:
    safetensors.torch.save_file({"0.weight": torch.ones(2, 10)}, f"{path}.tied")
dist.barrier()
assert weightload.load_into(tied.state_dict(), f"{path}.tied").missing == []
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_models_of_fsdp_and_tensor_parallelism_compute_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(10, 24), "down": nn.Linear(24, 10), "head": nn.Linear(10, 7)})
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert_done(run_ranks(TWO_DIMENSIONS, 4, tmp_path, tmp_path / "m.safetensors"))


def boxes(chance: random.Random, shape: tuple[int, ...]) -> Any:
    kind = chance.randrange(6)
    if kind < 2:
        return (None, False)[kind]
    found: list[Any] = []
    for size in shape[: chance.randrange(len(shape) + 1)]:
        if chance.random() < 0.7:
            begin = chance.randrange(size + 1)
            found.append(slice(begin, chance.choice([None, begin + 1, begin + 3, -1])))
        else:
            ends = sorted(chance.randrange(size + 1) for _ in range(4))
            found.append([(ends[2], ends[3]), (ends[0], ends[1])])
    return tuple(found)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_the_iterator_yields_boxes(backend: Any, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    shapes = {f"t{n}": [chance.choice([1, 2, 4, 9, 40]) for _ in range(chance.randrange(1, 4))] for n in range(40)}
    path = write_tensors(
        tmp_path / "m.safetensors",
        [(name, chance.choice(["I16", "F32", "U8"]), shape) for name, shape in shapes.items()],
    )
    whole = safetensors.torch.load_file(path)
    for _ in range(20):
        wanted = {name: boxes(chance, tuple(tensor.shape)) for name, tensor in whole.items()}
        asked = {}

        def shard(
            name: str, shape: tuple[int, ...], dtype: torch.dtype, wanted: Any = wanted, asked: Any = asked
        ) -> Any:
            asked[name] = (shape, dtype)
            return wanted[name]

        weights = weightload.safetensors_weights_iterator(path, to_cpu=True, shard=shard, backend=backend)
        expected = {name: cut(whole[name], box) for name, box in wanted.items() if box is not False}
        assert weights.total_bytes == sum(tensor.nbytes for tensor in expected.values())  # type: ignore[union-attr]
        got = dict(weights)
        assert list(got) == [name for name in shapes if name in expected]
        for name, tensor in got.items():
            assert tensor.shape == expected[name].shape
            assert torch.equal(raw(tensor), raw(expected[name])), (name, wanted[name])
            assert tensor.is_contiguous()
        assert asked == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in whole.items()}


def test_parts_of_packed_elements_count_as_torch_counts(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("x", "F4", [4, 8])])
    whole = weightload.load_file(path)["x"].view(torch.uint8)
    ((_, part),) = weightload.safetensors_weights_iterator(
        path, to_cpu=True, shard=lambda *_: (slice(1, 3), slice(2, 4))
    )
    assert torch.equal(part.view(torch.uint8), whole[1:3, 2:4])


def test_answers_that_are_no_boxes(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("x", "F32", [4, 8])])
    answers: list[tuple[Any, type[Exception], str]] = [
        (True, TypeError, "shard.. of x must be None, False or a tuple"),
        ([slice(1)], TypeError, "not a list"),
        ((3,), TypeError, "not 3"),
        ((slice(None, None, 2),), ValueError, "step 2"),
        ((slice(0.5, 2),), TypeError, "shard.. of x: slice indices"),
        (([(0.5, 2.0)],), TypeError, "lists of .begin, end."),
        ((["12"],), TypeError, "lists of .begin, end."),
        (([(1, 2, 3)],), TypeError, "lists of .begin, end."),
        (([(0, 5)],), ValueError, "0 to 5 of a dimension that has 4"),
        (([(3, 2)],), ValueError, "3 to 2"),
        ((slice(1),) * 3, ValueError, "3 dimensions, the tensor 2"),
    ]
    for answer, kind, words in answers:
        with pytest.raises(kind, match=words):
            weightload.safetensors_weights_iterator(path, to_cpu=True, shard=lambda *_, answer=answer: answer)
    with pytest.raises(TypeError, match="shard must be a function"):
        weightload.safetensors_weights_iterator(path, to_cpu=True, shard=3)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        weightload.safetensors_weights_iterator(path, to_cpu=True, shard=lambda *_: 1 // 0)


@pytest.fixture
def arm() -> Iterator[Any]:
    yield _C.arm_fault
    _C.disarm_fault()


COLUMNS = {"halves": slice(0, 256), "far apart": slice(3, 5)}  # of 512: read with what is between, or one by one


@pytest.mark.parametrize("fault", ["short_read", "interrupt"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_reads_of_pieces_that_are_cut_short_go_on(columns: str, fault: str, arm: Any, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("x", "F32", [64, 512])])
    box = slice(None), COLUMNS[columns]
    whole = safetensors.torch.load_file(path)["x"]
    arm(fault, count=50)
    ((_, part),) = weightload.safetensors_weights_iterator(path, to_cpu=True, shard=lambda *_: box)
    assert torch.equal(raw(part), raw(whole[box].contiguous()))


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_piece_that_cannot_be_read_names_its_tensor(columns: str, arm: Any, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("a", "F32", [4, 8]), ("x", "F32", [64, 512])])
    box = {"a": None, "x": (slice(None), COLUMNS[columns])}

    def load() -> None:
        with settings.override(threads=1):
            dict(
                weightload.safetensors_weights_iterator(
                    path, to_cpu=True, shard=lambda name, *_: box[name], backend="pread"
                )
            )

    arm("delay", first=1 << 60)
    load()
    arm("error", first=_C.reads_since_armed() - 1, error_number=errno.EIO)
    with pytest.raises(errors.ReadError) as caught:
        load()
    assert caught.value.filename == str(path)
    assert caught.value.tensor == "x"
    assert caught.value.errno == errno.EIO
    assert caught.value.offset is not None
