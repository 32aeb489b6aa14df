"""``rename=``: new names, and tensors of the checkpoint that fill one of the target together."""

from __future__ import annotations

import collections
import errno
import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import SEED, TESTS, open_checkpoints, write_tensors
from hypothesis import strategies as st
from support.parts import empty_like, random_placements, rank_of
from support.ranks.groups import assert_done, run_ranks
from support.rename import Cut, fuse, numbers
from support.simulated import raw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import weightload
from weightload import _C, errors, settings
from weightload._checkpoint.selection import open_files
from weightload._into.state_dict import match
from weightload._load import fused_weights
from weightload._load.renaming import rename_opened
from weightload._parts import boxes

BACKENDS: Any = ["mmap", "pread"]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.complex64, torch.bool]
ODD = 7
SIZES = (1, 2, 3, 5, 8)


def save(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    path = folder / "m.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def random_whole(chance: random.Random, count: int, sizes: tuple[int, ...] = SIZES) -> dict[str, torch.Tensor]:
    whole = {}
    for number in range(count):
        shape = [chance.choice(sizes) for _ in range(chance.randrange(4))]
        whole[f"t{number}"] = numbers(shape, chance.choice(DTYPES))
    return whole


def assert_equal(ours: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    for name, tensor in whole.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(ours[name], tensor), name


# Boxes.


@st.composite
def some_boxes(draw: Any) -> tuple[list[int], tuple[boxes.Bounds, ...]]:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    ends = [st.lists(st.integers(0, size), min_size=2, max_size=2).map(sorted).map(tuple) for size in shape]
    return shape, tuple(draw(st.lists(st.tuples(*ends), max_size=6)))


@hypothesis.given(some_boxes())
@hypothesis.settings(max_examples=400, deadline=None)
def test_tiling_is_what_counting_says(drawn: tuple[list[int], tuple[boxes.Bounds, ...]]) -> None:
    shape, laid = drawn
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in laid:
        counts[tuple(slice(*ends) for ends in box)] += 1
    gap, clash = boxes.tiling(laid, tuple(shape))
    assert (clash is not None) == bool((counts > 1).any())
    if clash is not None:
        both = torch.zeros(shape, dtype=torch.int64)
        for name in clash:
            both[tuple(slice(*ends) for ends in laid[name])] += 1
        assert clash[0] != clash[1]
        assert (both > 1).any()
    else:
        assert (gap is not None) == bool((counts == 0).any())
    if gap is not None:
        inside = counts[tuple(slice(*ends) for ends in gap)]
        assert inside.numel() > 0
        assert not inside.any()


def test_many_boxes_take_no_time() -> None:
    many = tuple(((a, a + 1), (8 * b, 8 * b + 8)) for a in range(300) for b in range(100))
    assert boxes.tiling(many, (300, 800)) == (None, None)
    assert boxes.tiling(many[:-1], (300, 800)) == (((299, 300), (792, 800)), None)
    assert boxes.tiling((*many, many[7]), (300, 800)) == (None, (7, len(many)))


# Bit for bit.


@pytest.mark.parametrize("kind", ["as it is", "transposed", "wider", "parameters"])
@pytest.mark.parametrize("files", [1, 3])
def test_pieces_fill_what_exists(kind: str, files: int, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut = Cut(chance, random_whole(chance, 12))
        target: dict[str, torch.Tensor] = {}
        for name, tensor in cut.whole.items():
            target[name] = torch.ones_like(tensor)
            if kind == "transposed" and tensor.dim() > 1:
                target[name] = torch.ones_like(tensor.transpose(0, -1).contiguous()).transpose(0, -1)
            elif kind == "wider" and tensor.dtype in (torch.float32, torch.uint8, torch.bfloat16):
                target[name] = torch.ones_like(tensor, dtype=torch.float64)
            elif kind == "parameters" and tensor.is_floating_point():
                target[name] = nn.Parameter(torch.ones_like(tensor))
        before = {name: tensor._version for name, tensor in target.items()}
        report = weightload.load_into(target, cut.save(folder, files), rename=cut.answers)
        for name, tensor in cut.whole.items():
            assert torch.equal(target[name], tensor.to(target[name].dtype)), (name, cut.answers)
            assert target[name]._version > before[name] or not tensor.numel()
        assert sorted(report.loaded) == sorted(cut.whole)
        assert (report.missing, report.unexpected) == ([], [])
        assert report.bytes == sum(tensor.nbytes for tensor in cut.whole.values())
        if kind == "parameters":
            contiguous = 0
            for name, answer in cut.answers.items():
                if isinstance(answer, str) or target[answer[0]][answer[1]].is_contiguous():
                    contiguous += 1
                assert cut.pieces[name].numel()
            assert report.in_place == contiguous


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("files", [1, 3])
def test_the_iterator_yields_whole_tensors_once(backend: Any, files: int, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut = Cut(chance, random_whole(chance, 12))
        paths = cut.save(folder, files)
        order = [name for path in paths for name, _ in weightload.safetensors_weights_iterator(path, to_cpu=True)]
        targets = {name: answer if isinstance(answer, str) else answer[0] for name, answer in cut.answers.items()}
        last = {targets[name]: number for number, name in enumerate(order)}
        weights = weightload.safetensors_weights_iterator(paths, to_cpu=True, rename=cut.answers.get, backend=backend)
        assert len(weights) == len(cut.whole)
        assert weights.total_bytes == sum(tensor.nbytes for tensor in cut.whole.values())
        got = list(weights)
        assert [name for name, _ in got] == sorted(last, key=last.__getitem__)
        assert_equal(dict(got), cut.whole)
        for _, tensor in got:
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
            raw(tensor).fill_(1)  # what is mapped can be written to
            tensor.zero_()


@pytest.mark.parametrize("dtype", ["F4", "F8_E4M3", "BOOL", "U64", "I16", "C64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_columns_and_stacks_of_every_kind(dtype: str, backend: Any, tmp_path: Path) -> None:
    """Boxes count elements as torch does: packed ones in pairs."""
    shapes = {"a": [3, 8], "b": [3, 8], "c": [3, 8]}
    path = write_tensors(tmp_path / "m.safetensors", [(name, dtype, shape) for name, shape in shapes.items()])
    whole = weightload.load_file(path)
    kind, width = whole["a"].dtype, whole["a"].shape[1]
    raws = [tensor.view(torch.uint8).reshape(3, width, -1) for tensor in whole.values()]
    tables: list[tuple[Callable[[int], Any], torch.Tensor]] = [
        (lambda n: (slice(3 * n, 3 * n + 3),), torch.cat(raws)),
        (lambda n: (slice(None), slice(width * n, width * n + width)), torch.cat(raws, 1)),
        (lambda n: (n,), torch.stack(raws)),
        (lambda n: (slice(None), n), torch.stack(raws, 1)),
        (lambda n: (slice(None), slice(None), n), torch.stack(raws, 2)),
    ]
    for box, expected in tables:
        ((name, tensor),) = weightload.safetensors_weights_iterator(
            path, to_cpu=True, backend=backend, rename=lambda name, box=box: ("x", box("abc".index(name)))
        )
        assert (name, tensor.dtype) == ("x", kind)
        assert torch.equal(tensor.view(torch.uint8).reshape(expected.shape), expected)


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (4,), (2, 2), (2, 3)], ids=str)
def test_pieces_of_shards(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    """Any placements, of which any box is cut: what distribute_tensor deals out of the whole tensor."""
    chance = random.Random(SEED + sum(mesh_shape))
    for number in range(15):
        folder = tmp_path / str(number)
        folder.mkdir()
        whole = random_whole(chance, 10, (1, 2, 3, 5, 8, 16, 33))
        target, expected = {}, {}
        size = int(torch.tensor(mesh_shape).prod())
        with rank_of(mesh_shape, chance.randrange(size)) as mesh:
            for name, tensor in whole.items():
                placements = random_placements(chance, tensor.dim(), mesh_shape)
                shard = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
                expected[name], target[name] = shard.to_local().clone(), empty_like(shard)
                if chance.random() < 0.3 and tensor.dtype == torch.float32:  # of another dtype
                    target[name] = empty_like(distribute_tensor(tensor.double(), mesh, placements, src_data_rank=None))
            cut = Cut(chance, whole)
            before = {name: tensor._version for name, tensor in target.items()}
            report = weightload.load_into(target, cut.save(folder, 2), rename=cut.answers)
            for name, tensor in target.items():
                local = tensor.to_local()
                words = f"{name}: {tensor.placements} of {tuple(tensor.shape)}, rank {dist.get_rank()}"
                assert torch.equal(local, expected[name].to(local.dtype)), (words, cut.answers)
                assert tensor._version > before[name] or not local.numel()
            assert report.bytes == sum(tensor.nbytes for tensor in expected.values())
            assert sorted(report.loaded) == sorted(whole)


def test_no_more_is_read_than_the_shard_of_the_pieces(tmp_path: Path) -> None:
    state = {name: torch.randn(64, 8192) for name in "qkv"}
    path = save(tmp_path, state)
    whole = torch.cat(list(state.values()))
    with rank_of((4,), 1) as mesh:
        shard = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)  # rows 48 to 96: of two of them
        target = {"qkv": empty_like(shard)}
        rename = {name: ("qkv", (slice(64 * n, 64 * n + 64),)) for n, name in enumerate(state)}
        report = weightload.load_into(target, path, rename=rename)
        assert torch.equal(target["qkv"].to_local(), shard.to_local())
        assert sum(file.bytes for file in report.stats["cpu"].files) == report.bytes == shard.to_local().nbytes
        assert report.in_place == 3  # of one nothing


# Models.


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 16, **options)
        self.register_buffer("experts", torch.zeros(3, 5, 6))
        self.norm = nn.BatchNorm1d(6)


def checkpoint_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random numbers under the names of a hub's checkpoint."""
    torch.manual_seed(SEED)
    state = {f"model.{name}": torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in model.state_dict().items()}
    for name in [name for name in state if ".qkv." in name]:
        whole = state.pop(name)
        for part, rows in (("q", slice(0, 8)), ("k", slice(8, 12)), ("v", slice(12, 16))):
            state[name.replace(".qkv.", f".{part}.").removeprefix("model.")] = whole[rows].clone()
    for name in [name for name in state if name.endswith("experts")]:
        for number, one in enumerate(state.pop(name)):
            state[f"{name.removeprefix('model.').removesuffix('experts')}{number}.experts"] = one.clone()
    state["rotary.inv_freq"] = torch.rand(3)
    return state


def expected_of(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what load_state_dict makes of tensors that were put together before."""
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        answer = fuse(name)
        if answer is not None:
            new, box = (answer, ()) if isinstance(answer, str) else answer
            whole[new][box] = tensor
    return whole


@pytest.mark.parametrize("kind", ["plain", "hook after", "tied"])
def test_a_model_is_as_load_state_dict_leaves_it(kind: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(Attention(), Attention())
        if kind == "hook after":
            model[0].register_load_state_dict_post_hook(lambda *_: None)
        if kind == "tied":
            model[1].qkv.weight = model[0].qkv.weight  # type: ignore[union-attr]
        return model

    ours, theirs = make(), make()
    state = checkpoint_of(ours)
    path = save(tmp_path, state)
    theirs.load_state_dict(expected_of(theirs, state))
    report = weightload.load_into(ours, path, rename=fuse)
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert sorted(report.loaded) == sorted(ours.state_dict())
    assert (report.missing, report.unexpected, report.took_part) == ([], [], [])
    if kind == "tied":  # read once
        pieces = sum(tensor.nbytes for name, tensor in state.items() if fuse(name)) - ours[0].qkv.weight.nbytes  # type: ignore
        assert sum(file.bytes for file in report.stats["cpu"].files) == pieces


def test_what_a_hook_writes_over_is_loaded_again(tmp_path: Path) -> None:
    """Hooks run at their module's turn, before those of the modules behind it, as in load_state_dict."""

    def make() -> nn.Sequential:
        model = nn.Sequential(nn.BatchNorm1d(6), Attention())

        def over(*_: object) -> None:
            with torch.no_grad():
                model[1].qkv.weight.fill_(ODD)  # type: ignore[union-attr,operator]

        model[0].register_load_state_dict_post_hook(over)
        return model

    ours, theirs = make(), make()
    state = checkpoint_of(ours)
    path = save(tmp_path, state)
    theirs.load_state_dict(expected_of(theirs, state))
    weightload.load_into(ours, path, rename=fuse)
    assert_equal(ours.state_dict(), theirs.state_dict())


def test_modules_that_take_part_get_new_names_and_no_boxes(tmp_path: Path) -> None:
    ours = nn.Sequential(Attention(), nn.Linear(2, 2))
    ours[1].register_load_state_dict_pre_hook(lambda *_: None)
    state = checkpoint_of(ours)
    path = save(tmp_path, state)
    report = weightload.load_into(ours, path, rename=fuse)
    assert report.took_part == ["1"]
    assert torch.equal(ours[1].weight, state["model.1.weight"])
    ours[0].register_load_state_dict_pre_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(errors.StateDictError, match=r"'0.qkv.weight \(from 0.q.weight\)'.* takes part"):
        weightload.load_into(ours, path, rename=fuse)
    assert_equal(ours.state_dict(), before)


def test_columns_are_not_held_back(tmp_path: Path) -> None:
    """They lie among each other and do not overlap: each is copied when it comes, not when all are there."""
    path = save(tmp_path, {"q": torch.ones(4, 3), "k": torch.full((4, 2), 2.0), "z": torch.full((4, 5), 3.0)})
    answers: Any = {"q": ("x", (slice(None), slice(0, 3))), "k": ("x", (slice(None), slice(3, 5)))}
    memory = torch.zeros(4, 5)

    def overlapping(target: dict[str, torch.Tensor]) -> list[str]:
        files = open_files([path])
        renamed = rename_opened(files, answers, "error", set)
        return match(target, files, False, renamed).overlapping

    assert overlapping({"x": memory}) == []
    assert len(overlapping({"x": memory, "z": memory})) == 3  # these do
    weightload.load_into({"z": memory, "x": memory}, path, rename=answers)
    assert memory[0].tolist() == [1, 1, 1, 2, 2]
    weightload.load_into({"x": memory, "z": memory}, path, rename=answers)
    assert memory[0].tolist() == [3] * 5


def test_tied_targets_of_which_only_one_is_put_together(tmp_path: Path) -> None:
    path = save(tmp_path, {"q": torch.ones(2, 3), "k": torch.full((2, 3), 2.0)})
    memory = torch.zeros(4, 3)
    rename = {"q": ("a", (slice(0, 2),)), "k": ("a", (slice(2, 4),))}
    report = weightload.load_into({"a": memory, "b": memory}, path, rename=rename)
    assert (report.loaded, report.missing) == (["a"], [])
    assert memory[:, 0].tolist() == [1, 1, 2, 2]
    # Another cut of the same memory comes later in the target's order, and counts.
    rename = {"q": ("a", (slice(0, 2),)), "k": ("b", (slice(1, 3),))}
    weightload.load_into({"a": memory, "b": memory}, path, rename=rename, strict=False)
    assert memory[:, 0].tolist() == [1, 2, 2, 2]
    weightload.load_into({"b": memory, "a": memory}, path, rename=rename, strict=False)
    assert memory[:, 0].tolist() == [1, 1, 2, 2]


def test_the_real_checkpoint_with_fused_attention(real_checkpoint: Path) -> None:
    state = safetensors.torch.load_file(real_checkpoint)
    width = state["encoder.layer.0.attention.self.query.bias"].numel()

    def rename(name: str) -> Any:
        for number, part in enumerate(("query", "key", "value")):
            if f".self.{part}." in name:
                rows = slice(number * width, (number + 1) * width)
                return name.replace(f".{part}.", ".qkv.").removeprefix("encoder."), (rows,)
        return name.removeprefix("encoder.")

    expected = collections.defaultdict(list)
    for name, tensor in state.items():
        answer = rename(name)
        begin, new = (0, answer) if isinstance(answer, str) else (answer[1][0].start, answer[0])
        expected[new].append((begin, tensor))
    whole = {name: torch.cat([t for _, t in sorted(p, key=lambda x: x[0])]) for name, p in expected.items()}
    assert len(whole) < len(state)
    target = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    report = weightload.load_into(target, real_checkpoint, rename=rename)
    assert_equal(target, whole)
    assert (report.in_place, report.bytes) == (len(state), sum(tensor.nbytes for tensor in state.values()))
    for backend in BACKENDS:
        weights = weightload.safetensors_weights_iterator(real_checkpoint, to_cpu=True, rename=rename, backend=backend)
        got = dict(weights)
        assert_equal(got, whole)
        assert len(got) == len(whole)
        # Pieces are read into their tensor, without a view of the mapped file between.
        fused = sum(tensor.nbytes for name, tensor in whole.items() if ".qkv." in name)
        (file,) = weights.stats().files
        assert file.bytes - file.mapped_bytes >= fused


FSDP = """
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, sys.argv[5])
from support.rename import fuse
from into.test_rename import Attention, checkpoint_of, expected_of

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(bias=True), Attention()

path = sys.argv[4]
import safetensors.torch
state = safetensors.torch.load_file(path)
plain = Net()
plain.load_state_dict(expected_of(plain, state))
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
for kind in ("fsdp", "tp", "both"):
    torch.manual_seed(rank)
    model = Net()
    if kind != "fsdp":
        parallelize_module(model, mesh["tp"], {"first.qkv": ColwiseParallel(), "second.qkv": RowwiseParallel()})
    if kind != "tp":
        over = mesh["dp"] if kind == "both" else init_device_mesh("cpu", (4,))
        for part in (model.first, model):
            fully_shard(part, mesh=over)
    for group in (None, dist.group.WORLD):  # whose ranks agree on what they load, whatever they have of it
        report = weightload.load_into(model, path, rename=fuse, group=group, strategy="striped")
        assert sorted(report.loaded) == sorted(model.state_dict()), report
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(whole, plain.state_dict()[name]), (kind, name)
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_models_of_fsdp_and_tensor_parallelism_get_their_shards_of_the_boxes(tmp_path: Path) -> None:
    model = nn.Module()
    model.first, model.second = Attention(bias=True), Attention()
    path = save(tmp_path, checkpoint_of(model))
    assert_done(run_ranks(FSDP, 4, tmp_path, path, TESTS))


# Names.


def test_names_prefixes_and_what_is_skipped(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [(f"model.{n}", "F32", [4]) for n in "abc"])
    whole = safetensors.torch.load_file(path)
    rename: Any
    for rename in (
        lambda name: None if name.endswith("b") else name.removeprefix("model."),
        {"model.a": "a", "model.b": None, "model.c": "c", "of another checkpoint": ("x", "y")},
        collections.defaultdict(lambda: 1 // 0, {"model.a": "a", "model.b": None, "model.c": "c"}),
    ):
        target = {"a": torch.zeros(4), "c": torch.zeros(4)}
        assert weightload.load_into(target, path, rename=rename).loaded == ["a", "c"]
        for backend in BACKENDS:
            weights = weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename, backend=backend)
            assert (len(weights), weights.total_bytes) == (2, 32)
            got = dict(weights)
            assert list(got) == ["a", "c"]
            for tensors in (got, target):
                assert all(torch.equal(raw(tensors[name]), raw(whole[f"model.{name}"])) for name in tensors)
    # Names that a mapping lacks stay; two may change places.
    rename = {"model.a": "model.b", "model.b": "model.a"}
    got = dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename))
    assert list(got) == ["model.b", "model.a", "model.c"]
    assert torch.equal(raw(got["model.b"]), raw(whole["model.a"]))


def test_names_and_shard_are_told_the_checkpoints_names(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [(n, "F32", [4]) for n in "abc"])
    whole = safetensors.torch.load_file(path)
    asked = []

    def rename(name: str) -> str:
        asked.append(name)
        return name.upper()

    got = dict(weightload.safetensors_weights_iterator(path, to_cpu=True, names=["a", "c", "A"], rename=rename))
    assert (list(got), asked) == (["A", "C"], ["a", "c"])

    def shard(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        assert (name in whole, shape, dtype) == (True, (4,), torch.float32)
        return False if name == "b" else (slice(1, 3),)

    got = dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename=str.upper, shard=shard))
    assert list(got) == ["A", "C"]
    assert torch.equal(raw(got["C"]), raw(whole["c"][1:3]))
    with pytest.raises(ValueError, match="shard= asks for parts"):
        weightload.safetensors_weights_iterator(
            path, to_cpu=True, rename=lambda n: ("x", ("abc".index(n),)), shard=shard
        )


def test_an_index_and_duplicates_speak_of_the_checkpoints_names(tmp_path: Path) -> None:
    for number in range(2):
        safetensors.torch.save_file(
            {"q": torch.full((2,), 1.0 + number), "k": torch.full((2,), 3.0 + number), "x": torch.zeros(1)},
            tmp_path / f"{number}.safetensors",
        )
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    rename = {"q": ("qk", (slice(0, 2),)), "k": ("qk", (slice(2, 4),)), "x": None}
    target = {"qk": torch.zeros(4)}
    for load in (
        lambda **options: weightload.load_into(target, paths, rename=rename, **options),
        lambda **options: dict(weightload.safetensors_weights_iterator(paths, to_cpu=True, rename=rename, **options)),
    ):
        with pytest.raises(errors.DuplicateTensor) as caught:
            load()
        assert caught.value.tensor in ("q", "k")  # not x
        result = load(duplicates="last")
        found = target if isinstance(result, weightload.LoadReport) else result
        assert found["qk"].tolist() == [2, 2, 4, 4]
    # A tensor that is not loaded must decide nothing.
    safetensors.torch.save_file({"x": torch.zeros(1)}, paths[1])
    assert weightload.load_into(target, paths, rename=rename).loaded == ["qk"]
    got = dict(weightload.safetensors_weights_iterator(paths, to_cpu=True, rename=rename))
    assert got["qk"].tolist() == target["qk"].tolist() == [1, 1, 3, 3]
    assert weightload.load_into({}, paths, rename=lambda _: None).loaded == []


def test_progress_has_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, {"q": torch.ones(2, 3), "k": torch.ones(2, 3), "z": torch.ones(5)})
    rename = {"q": ("qk", (slice(0, 2),)), "k": ("qk", (slice(2, 4),))}
    seen: list[int] = []

    class Bar:
        def __init__(self, total: int, *_: object) -> None:
            seen.append(-total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...
        def close(self) -> None: ...
        def update(self, count: int) -> None:
            seen.append(count)

    monkeypatch.setattr("weightload._load.progress._bar", Bar)
    dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename, show_progress=True))
    assert sum(seen) == 0
    assert len(seen) == 3
    weightload.load_into({"qk": torch.zeros(4, 3), "z": torch.zeros(5)}, path, rename=rename, show_progress=True)
    assert sum(seen) == 0


# Answers that are refused.

WORDS = "must be None, a name, or .name, box."
ANSWERS: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, WORDS),
    (b"x", TypeError, WORDS),
    (["x"], TypeError, WORDS),
    ([("x", (0,)), ("y", (0,))], TypeError, WORDS),
    (("x",), TypeError, WORDS),
    (("x", (0,), 1), TypeError, WORDS),
    ((3, (0,)), TypeError, WORDS),
    ((None, (0,)), TypeError, WORDS),
    (("x", None), TypeError, "the box must be a tuple.*not a NoneType"),
    (("x", 3), TypeError, "the box must be a tuple.*not a int"),
    (("x", [slice(1)]), TypeError, "the box must be a tuple.*not a list"),
    (("x", slice(0, 4)), TypeError, "the box must be a tuple.*not a slice"),
    (("x", (1.5,)), TypeError, "an index for each dimension; not 1.5"),
    (("x", (True,)), TypeError, "not True"),
    (("x", (...,)), TypeError, "not Ellipsis"),
    (("x", (None,)), TypeError, "not None"),
    (("x", (slice(0.5, 2),)), TypeError, "not 0.5"),
    (("x", (slice(0, 4, 2),)), ValueError, "step 2"),
    (("x", (slice(0, 4, 0),)), ValueError, "step 0"),
    (("x", (slice(-4, None),)), ValueError, "negative index, -4"),
    (("x", (-1,)), ValueError, "negative index, -1"),
    (("x", (slice(4, 2),)), ValueError, "from 4 to 2"),
    ("\ud800", ValueError, "no text"),
    (("\ud800", ()), ValueError, "no text"),
]


@pytest.mark.parametrize(("answer", "kind", "words"), ANSWERS, ids=[repr(answer[0])[:40] for answer in ANSWERS])
def test_answers_that_are_none(answer: Any, kind: type[Exception], words: str, tmp_path: Path) -> None:
    """The tensor is named, whatever its name is, before any byte, with the files closed."""
    path = save(tmp_path, {"a": torch.ones(4), "na\nme": torch.ones(4)})
    target = {"a": torch.zeros(4), "x": torch.zeros(4)}
    rename = {"na\nme": answer}
    for load in (
        lambda: weightload.load_into(target, path, rename=rename),
        lambda: weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename),
        lambda: weightload.safetensors_weights_iterator(path, to_cpu=True, rename=lambda n: rename.get(n, n)),
    ):
        with pytest.raises(kind, match=words) as caught:
            load()
        assert r"rename() of na\nme" in str(caught.value)
        assert open_checkpoints() == []
        assert not target["a"].any()


def test_what_rename_raises_comes_out(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)})
    target = {"a": torch.zeros(4), "b": torch.zeros(4)}

    def rename(name: str) -> str:
        if name == "b":
            raise ZeroDivisionError
        return name

    for load in (
        lambda: weightload.load_into(target, path, rename=rename),
        lambda: weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename),
    ):
        with pytest.raises(ZeroDivisionError) as caught:
            load()
        if sys.version_info >= (3, 11):
            assert caught.value.__notes__ == ["raised by rename() of b"]
        assert open_checkpoints() == []
        assert not target["a"].any()
    for wrong in (3, "prefix.", ["a"], {"a"}):
        for call in (
            lambda wrong=wrong: weightload.load_into(target, path, rename=wrong),
            lambda wrong=wrong: weightload.safetensors_weights_iterator(path, to_cpu=True, rename=wrong),
        ):
            with pytest.raises(TypeError, match="rename must be a function of a tensor's name, or a mapping"):
                call()


def rows(*ends: int) -> tuple[slice]:
    return (slice(*ends),)


# From q and k, (2, 3) and float32, s, a scalar, and h, (2, 3) and float16, into x, (4, 3): answers, what load_into
# says, and what the iterator says; None: nothing.
WRONG: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "overlap": ({"q": ("x", rows(0, 2)), "k": ("x", rows(1, 3))}, "boxes of x overlap", "boxes of x overlap"),
    "twice": ({"q": ("x", rows(0, 2)), "k": ("x", rows(0, 2))}, "boxes of x overlap", "boxes of x overlap"),
    "gap": (
        {"q": ("x", rows(2, 4))},
        r"missing from the checkpoint: x\n.*only a part of x.*nothing fills \[0:2, 0:3\]",
        r"only a part of x is loaded: nothing fills \[0:2, 0:3\] of \(4, 3\)",
    ),
    "too short": ({"q": ("x", rows(0, 2))}, r"nothing fills \[2:4, 0:3\]", None),
    "beyond": (
        {"q": ("x", rows(0, 2)), "k": ("x", rows(3, 5))},
        r"x \(from k\): the box ends at 5 in a dimension of 4",
        r"nothing fills \[2:3, 0:3\]",
    ),
    "far beyond": (
        {"q": ("x", rows(0, 2)), "k": ("x", rows(1 << 70, (1 << 70) + 2))},
        r"x \(from k\): the box ends at",
        r"nothing fills \[2:",
    ),
    "another shape": (
        {"q": ("x", rows(0, 2)), "k": ("x", rows(2, 5))},
        r"x \(from k\): the box ends at 5",
        r"x \(from k\): the box has 3 indices where the tensor has 2",
    ),
    "another width": (
        {"q": ("x", (slice(0, 4), slice(0, 2)))},
        r"size mismatch for x \(from q\): the checkpoint has \(2, 3\), the box \[0:4, 0:2\] of the target \(4, 2\)",
        "the box has 4 indices where the tensor has 2",
    ),
    "too many dimensions": (
        {"q": ("x", (slice(0, 2), slice(0, 3), slice(0, 1)))},
        "the box has 3 dimensions, the target 2",
        "more slices than the tensor has dimensions",
    ),
    "an index too many": (
        {"q": ("x", (0,)), "k": ("x", (1,))},
        r"size mismatch for x \(from q\): the checkpoint has \(2, 3\), the box \[0:1, 0:3\] of the target \(3,\)",
        None,
    ),
    "a scalar": ({"s": ("x", ())}, r"size mismatch for x \(from s\): the checkpoint has \(\)", None),
    "other dimensions": (
        {"q": ("x", rows(0, 2)), "s": ("x", (3,))},
        r"size mismatch for x \(from s\)",
        "boxes of 2 and 1 dimensions",
    ),
    "another dtype": ({"q": ("x", rows(0, 2)), "h": ("x", rows(2, 4))}, None, "must have one dtype, not F32 and F16"),
    "one name": ({"q": "x", "k": "x"}, "the name x to two tensors, k and q", "the name x to two tensors, k and q"),
    "a box and none": (
        {"q": ("x", rows(0, 2)), "k": "x"},
        "gives the name x to two tensors, k and q",
        "the name x to two tensors, k and q",
    ),
    "none and a box": (
        {"q": "x", "k": ("x", rows(0, 2))},
        "gives the name x to two tensors, k and q",
        "the name x to two tensors, k and q",
    ),
    "the name of another": ({"q": "k"}, "gives the name k to two tensors", "gives the name k to two tensors, k and q"),
    "unexpected": ({"q": ("y", rows(0, 2)), "k": ("y", rows(2, 4))}, "missing.*: x\n.*unexpected.*: y$", None),
}


@pytest.mark.parametrize("name", WRONG)
def test_boxes_that_do_not_fit_are_refused_before_any_byte(name: str, tmp_path: Path) -> None:
    answers, into, iterated = WRONG[name]
    kinds = {"q": torch.ones(2, 3), "k": torch.ones(2, 3), "s": torch.ones(()), "h": torch.ones(2, 3).half()}
    state = {key: kinds[key] for key in kinds if key in answers or (key == "k" and "k" in answers.values())}
    path = save(tmp_path, {**state, "z": torch.ones(2)})
    target = {"x": torch.zeros(4, 3), "z": torch.zeros(2)}
    versions = [tensor._version for tensor in target.values()]
    if into is None:
        weightload.load_into(target, path, rename=answers)
        assert target["x"].all()
    else:
        with pytest.raises(weightload.WeightLoadError, match=into):
            weightload.load_into(target, path, rename=answers)
        assert not any(tensor.any() for tensor in target.values())
        assert versions == [tensor._version for tensor in target.values()]
    for backend in BACKENDS:
        if iterated is None:
            assert dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename=answers, backend=backend))
            continue
        with pytest.raises((ValueError, errors.DuplicateTensor), match=iterated):
            weightload.safetensors_weights_iterator(path, to_cpu=True, rename=answers, backend=backend)
    assert open_checkpoints() == []


def test_what_is_filled_in_part_is_missing_where_that_is_allowed(tmp_path: Path) -> None:
    path = save(tmp_path, {"q": torch.ones(2, 3), "z": torch.ones(2), "u": torch.ones(1), "w": torch.ones(1)})
    target = {"x": torch.zeros(4, 3), "z": torch.zeros(2)}
    rename = {"q": ("x", rows(1, 3)), "u": ("y", (0,)), "w": ("y", (1,))}
    report = weightload.load_into(target, path, rename=rename, strict=False)
    assert (report.loaded, report.missing, report.unexpected) == (["z"], ["x"], ["y"])
    assert target["x"][:, 0].tolist() == [0, 1, 1, 0]
    model = nn.Linear(3, 4, bias=False)
    model.register_load_state_dict_post_hook(lambda *_: None)
    with pytest.raises(errors.StateDictError, match="missing from the checkpoint: weight"):
        weightload.load_into(model, path, rename={"q": ("weight", rows(1, 3)), "z": None, "u": None, "w": None})


def test_a_mismatch_names_both_names(tmp_path: Path) -> None:
    path = save(tmp_path, {"old": torch.ones(2)})
    with pytest.raises(errors.StateDictError, match=r"size mismatch for new \(from old\): the checkpoint has \(2,\)"):
        weightload.load_into({"new": torch.zeros(3)}, path, rename={"old": "new"})


@pytest.mark.filterwarnings("ignore")
def test_memory_that_cannot_be_filled_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, {"q": torch.ones(2, 3), "k": torch.ones(2, 3)})
    rename = {"q": ("x", rows(0, 2)), "k": ("x", rows(2, 4))}
    refused: dict[str, torch.Tensor] = {
        "has no memory": torch.zeros(4, 3, device="meta"),
        "is lazy": nn.UninitializedParameter(),
        "expanded": torch.zeros(1, 3).expand(4, 3),
        "no box can be cut": torch.quantize_per_tensor(torch.zeros(4, 3), 0.1, 0, torch.qint8),
        "sparse": torch.zeros(4, 3).to_sparse(),
        "no box can be cut of a Tensor .*mkldnn": torch.zeros(4, 3).to_mkldnn(),
    }
    for words, tensor in refused.items():
        with pytest.raises(errors.StateDictError, match=words):
            weightload.load_into({"x": tensor}, path, rename=rename)
    with rank_of((2,), 0) as mesh:
        sums = DTensor.from_local(torch.zeros(4, 3), mesh, [dist.tensor.Partial()], run_check=False)
        with pytest.raises(errors.StateDictError, match="neither Shard nor Replicate"):
            weightload.load_into({"x": sums}, path, rename=rename)
        copy = distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()], src_data_rank=None)
        assert weightload.load_into({"x": copy}, path, rename=rename).in_place == 2
        assert copy.to_local().all()
    with torch.inference_mode():
        inference = torch.zeros(4, 3)
    weightload.load_into({"x": inference}, path, rename=rename)
    assert inference.all()


def test_dtypes_that_torch_lacks(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("a", "F6_E2M3", [4]), ("b", "F32", [4])])
    weights = weightload.safetensors_weights_iterator(path, to_cpu=True, rename={"a": "new"})
    with pytest.raises(errors.TensorError, match="new"):
        list(weights)
    for box in ((0,), ()):
        with pytest.raises(errors.TensorError, match="no dtype for F6_E2M3"):
            weightload.safetensors_weights_iterator(path, to_cpu=True, rename={"a": ("x", box)})
    with pytest.raises(errors.TensorError, match="no dtype for F6_E2M3"):
        weightload.load_into({"x": torch.zeros(1, 4)}, path, rename={"a": ("x", (0,)), "b": None})
    got = dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename={"a": None, "b": "c"}))
    assert list(got) == ["c"]


def test_names_that_look_like_those_of_pieces(tmp_path: Path) -> None:
    """Pieces have names of their own inside of a load; whoever has one by chance is not mixed up with them."""
    names = ["q", "x (from q)", "x (from q)'"]
    path = save(tmp_path, {name: torch.full((2,), 1.0 + number) for number, name in enumerate(names)})
    got = dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename={"q": ("x", rows(0, 2))}))
    assert {name: tensor[0].item() for name, tensor in got.items()} == {"x": 1, "x (from q)": 2, "x (from q)'": 3}
    target = {name: torch.zeros(2) for name in got}
    weightload.load_into(target, path, rename={"q": ("x", rows(0, 2))})
    assert_equal(target, got)
    target["x (from q)''"] = torch.zeros(2)
    with pytest.raises(errors.StateDictError, match="stands for a box of another"):
        weightload.load_into(target, path, rename={"q": ("x", rows(0, 2))}, strict=False)


def test_tensors_without_elements(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.ones(0, 3), "b": torch.ones(2, 3), "c": torch.ones(0, 3)})
    rename = {"a": ("x", rows(0, 0)), "b": ("x", rows(0, 2)), "c": ("y", rows(0, 0))}
    target = {"x": torch.zeros(2, 3), "y": torch.zeros(0, 3)}
    report = weightload.load_into(target, path, rename=rename)
    assert (sorted(report.loaded), report.bytes) == (["x", "y"], 24)
    assert target["x"].all()
    for backend in BACKENDS:
        got = dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename, backend=backend))
        assert_equal(got, target)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_a_piece_names_both_names(backend: Any, arm: Callable[..., None], tmp_path: Path) -> None:
    path = save(tmp_path, {"q": torch.ones(2, 3), "k": torch.ones(2, 3)})
    target = {"x": torch.zeros(4, 3)}
    rename = {"q": ("x", rows(0, 2)), "k": ("x", rows(2, 4))}
    for load in (
        lambda: dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename, backend=backend)),
        lambda: weightload.load_into(target, path, rename=rename),
    ):
        with settings.override(threads=1):
            arm("delay", first=1 << 60)
            load()
            arm("error", first=_C.reads_since_armed() - 1, error_number=errno.EIO)
            with pytest.raises(errors.ReadError) as caught:
                load()
        assert (caught.value.tensor, caught.value.errno) == ("x (from q)", errno.EIO)
        assert open_checkpoints() == []


def test_what_the_caller_has_set_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, {"q": torch.ones(2, 3), "k": torch.ones(2, 3), "r": torch.ones(4, 2)})
    left = slice(0, 3)
    rename = {"q": ("x", (slice(0, 2), left)), "k": ("x", (slice(2, 4), left)), "r": ("x", (slice(None), slice(3, 5)))}
    for mode in (torch.device("meta"), torch.inference_mode(), FakeTensorMode()):
        target = {"x": torch.zeros(4, 5)}
        with mode:
            got = dict(weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename))["x"]
            weightload.load_into(target, path, rename=rename)
        for tensor in (got, target["x"]):
            assert (type(tensor), tensor.device.type, tensor.is_inference()) == (torch.Tensor, "cpu", False)
            assert tensor.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_is_not_there(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, {"q": torch.ones(2, 3), "k": torch.ones(2, 3)})

    def none(*_: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(fused_weights, "empty", none)
    with pytest.raises(errors.OutOfMemoryError, match=r"no memory for tensor `x`, of \(4, 3\)") as caught:
        weightload.safetensors_weights_iterator(
            path, to_cpu=True, backend=backend, rename={"q": ("x", rows(0, 2)), "k": ("x", rows(2, 4))}
        )
    assert caught.value.tensor == "x"
    assert open_checkpoints() == []


def test_leaving_early_leaves_nothing(tmp_path: Path) -> None:
    state = {f"{n}.{part}": torch.rand(4, 300) for n in range(50) for part in "qk"}
    path = save(tmp_path, state)

    def rename(name: str) -> Any:
        number, part = name.split(".")
        return f"{number}.qk", rows(*((0, 4) if part == "q" else (4, 8)))

    with weightload.safetensors_weights_iterator(path, to_cpu=True, rename=rename, backend="pread") as weights:
        for _, tensor in itertools.islice(weights, 3):
            assert tensor.shape == (8, 300)
        waiting = [made for made, _ in weights._pieces.values() if made.tensor is not None]  # type: ignore[union-attr]
        assert waiting
    assert all(made.tensor is None for made in waiting)
    assert list(weights) == []
    assert open_checkpoints() == []


def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    count = 100_000
    path = write_tensors(tmp_path / "m.safetensors", [(f"e.{n}", "U8", [2]) for n in range(count)])
    whole = torch.stack(list(safetensors.torch.load_file(path).values()))
    order = [int(name[2:]) for name in safetensors.torch.load_file(path)]
    expected = torch.empty_like(whole)
    expected[order] = whole
    target = {"e": torch.zeros(count, 2, dtype=torch.uint8)}
    weightload.load_into(target, path, rename=lambda name: ("e", (int(name[2:]),)))
    assert torch.equal(target["e"], expected)
    with pytest.raises(ValueError, match=r"nothing fills \[5:6, 0:2\]"):
        weightload.safetensors_weights_iterator(
            path, to_cpu=True, rename=lambda name: None if name == "e.5" else ("e", (int(name[2:]),))
        )
