"""load_into: bytes land in the parameters that are there, on the CPU and on the simulated accelerator."""

from __future__ import annotations

import errno
import gc
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import evict, thread_count, write_tensors
from support.simulated import DEVICE, OTHER, SMALL, current_stream

import weightload
from weightload import errors, settings

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.simulated)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "cpu":
        request.getfixturevalue("simulated")
    with settings.override(**SMALL):
        yield request.param


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(300, 64, dtype=dtype)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64 + i, dtype=dtype) for i in range(12))
        self.norm = torch.nn.BatchNorm1d(77, dtype=dtype)
        self.register_buffer("scratch", torch.zeros(5), persistent=False)


def filled(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 100)
    return model


def saved(model: torch.nn.Module, path: Path) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, path)
    return state


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[list[Path], dict[str, torch.Tensor]]:
    """Two files."""
    state = saved(filled(Model()), tmp_path / "all.safetensors")
    names = sorted(state)
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, part in zip(paths, (names[:17], names[17:]), strict=True):
        safetensors.torch.save_file({name: state[name] for name in part}, path)
    return paths, state


def assert_holds(target: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        assert torch.equal(target[name].detach().cpu(), tensor.to(target[name].dtype)), name


def test_bytes_land_in_the_parameters_that_are_there(device: str, checkpoint: Any) -> None:
    paths, state = checkpoint
    model = filled(Model(), seed=2).to(device)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    report = weightload.load_into(model, paths)
    assert_holds(model.state_dict(), state)
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert all(tensor._version > versions[name] for name, tensor in model.state_dict(keep_vars=True).items())
    assert sorted(report.loaded) == sorted(state)
    assert (report.missing, report.unexpected) == ([], [])
    assert report.bytes == sum(tensor.nbytes for tensor in state.values())
    assert report.in_place == len(state)
    assert set(report.seconds) == {"open", "match", "load", "total"}
    assert list(report.stats) == [device]


def test_a_mapping_is_a_target_too(device: str, checkpoint: Any) -> None:
    paths, state = checkpoint
    target = {name: torch.zeros_like(tensor).to(device) for name, tensor in state.items()}
    weightload.load_into(target, paths)
    assert_holds(target, state)


@pytest.mark.simulated
def test_in_place_needs_no_device_memory(simulated: Any, checkpoint: Any) -> None:
    paths, state = checkpoint
    model = Model().to(DEVICE)
    simulated.synchronize(0)
    simulated.limit_device_memory(simulated.live_bytes(0))
    with settings.override(**SMALL):
        weightload.load_into(model, paths)
    assert_holds(model.state_dict(), state)
    del model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_cast_where_they_go(device: str, checkpoint: Any, dtype: torch.dtype) -> None:
    paths, state = checkpoint
    model = Model(dtype).to(device)
    report = weightload.load_into(model, paths)
    assert_holds(model.state_dict(), state)
    assert report.in_place == 1  # num_batches_tracked


def test_other_layouts_are_copied(device: str, checkpoint: Any) -> None:
    paths, state = checkpoint
    target = {name: torch.zeros_like(tensor).to(device) for name, tensor in state.items()}
    target["layers.3.weight"] = torch.zeros(64, 67).to(device).t()
    target["layers.4.weight"] = torch.zeros(68, 128).to(device)[:, ::2]
    report = weightload.load_into(target, paths)
    assert_holds(target, state)
    assert report.in_place == len(state) - 2


def test_views_of_one_buffer_are_places(device: str, checkpoint: Any) -> None:
    """A flat buffer, as sharded optimizers keep: neighbours, not aligned, each in its own part."""
    paths, state = checkpoint
    floats = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.float32}
    flat = torch.full((sum(tensor.numel() for tensor in floats.values()) + 2,), -1.0).to(device)
    target, at = {}, 1
    for name, tensor in floats.items():
        target[name] = flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    report = weightload.load_into(target, paths, strict=False)
    assert report.unexpected == ["norm.num_batches_tracked"]
    assert report.in_place == len(floats)
    assert_holds(target, floats)
    assert flat.cpu()[0] == flat.cpu()[-1] == -1


def test_overlapping_memory_is_not_written_at_once(device: str, tmp_path: Path) -> None:
    flat = torch.zeros(3000).to(device)
    state = {"a": torch.rand(2000), "b": torch.rand(2000)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    report = weightload.load_into({"a": flat[:2000], "b": flat[1000:]}, tmp_path / "x.safetensors")
    assert report.in_place == 0
    assert torch.equal(flat.cpu(), torch.cat([state["a"][:1000], state["b"]]))


@pytest.mark.parametrize("both", [True, False])
def test_tied_weights(device: str, tmp_path: Path, both: bool) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 30, bias=False)
            self.embedding = torch.nn.Embedding(30, 8)
            self.embedding.weight = self.head.weight

    state = {"head.weight": torch.rand(30, 8)}
    if both:
        state["embedding.weight"] = torch.rand(30, 8)
    safetensors.torch.save_file(state, tmp_path / "tied.safetensors")
    model, theirs = Tied().to(device), Tied()
    model.embedding.weight = model.head.weight  # .to() to this device makes new parameters
    report = weightload.load_into(model, tmp_path / "tied.safetensors")
    theirs.load_state_dict(state, strict=False)
    assert_holds(model.state_dict(), theirs.state_dict())
    assert model.embedding.weight is model.head.weight
    assert (report.missing, sorted(report.loaded)) == ([], sorted(state))


def test_strict_names_all_differences_and_changes_nothing(device: str, checkpoint: Any) -> None:
    paths, _ = checkpoint
    model = filled(Model(), seed=3).to(device)
    model.extra = torch.nn.Parameter(torch.zeros(2).to(device))
    model.layers[2] = torch.nn.Linear(64, 1).to(device)
    del model.norm
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    for kind in (RuntimeError, weightload.WeightLoadError, errors.StateDictError):
        with pytest.raises(kind) as caught:
            weightload.load_into(model, paths)
    for part in ("extra", "norm.weight", "size mismatch for layers.2.weight", "(66, 64)", "(1, 64)", "layers.2.bias"):
        assert part in str(caught.value)
    del caught
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.2"):
        weightload.load_into(model, paths, strict=False)
    assert_holds(model.state_dict(), before)


def test_not_strict_reports_the_differences(device: str, checkpoint: Any) -> None:
    paths, state = checkpoint
    model = Model().to(device)
    model.extra = torch.nn.Parameter(torch.zeros(2).to(device))
    del model.norm
    report = weightload.load_into(model, paths, strict=False)
    assert report.missing == ["extra"]
    assert sorted(report.unexpected) == sorted(name for name in state if name.startswith("norm"))
    assert_holds(model.state_dict(), {name: state[name] for name in report.loaded})


def test_a_vector_of_one_is_a_scalar(device: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"s": torch.tensor([7.0])}, tmp_path / "s.safetensors")
    target = {"s": torch.tensor(0.0).to(device)}
    weightload.load_into(target, tmp_path / "s.safetensors")
    assert target["s"].cpu() == 7


def test_every_dtype(device: str, all_dtypes: Path) -> None:
    state = safetensors.torch.load_file(all_dtypes)
    target = {name: torch.empty_like(tensor).to(device) for name, tensor in state.items()}
    report = weightload.load_into(target, all_dtypes)
    assert report.in_place == len(state)
    for name, tensor in state.items():
        ours = target[name].cpu().reshape(-1).view(torch.uint8)
        assert torch.equal(ours, tensor.reshape(-1).view(torch.uint8)), name


def test_targets_without_memory_are_refused(checkpoint: Any) -> None:
    paths, _ = checkpoint
    with torch.device("meta"):
        model = Model()
    with pytest.raises(errors.StateDictError, match="to_empty"):
        weightload.load_into(model, paths)
    with pytest.raises(errors.StateDictError, match=r"no memory.*load_state_dict") as lazy:
        weightload.load_into(torch.nn.LazyLinear(3), paths)
    assert "to_empty" not in str(lazy.value)
    for wrong in ({"a": 3}, [torch.zeros(3)]):
        with pytest.raises(TypeError):
            weightload.load_into(wrong, paths)  # type: ignore[arg-type]
    for strange, words in (
        (torch.zeros(1, 3).expand(2, 3), "several of its elements are one"),
        (torch.zeros(2, 3).to_sparse(), "its layout is torch.sparse_coo"),
    ):
        with pytest.raises(errors.StateDictError, match=words):
            weightload.load_into({"a": strange}, paths)


def test_errors_of_matching_name_file_and_tensor(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("a", "F32", [2]), ("f", "F6_E2M3", [4])])
    for target, kind, tensor in (
        ({"a": torch.zeros(3)}, errors.StateDictError, "a"),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, errors.StateDictError, None),
        ({"a": torch.zeros(2), "f": torch.zeros(4)}, errors.TensorError, "f"),
    ):
        with pytest.raises(kind, match=re.escape(str(path))) as caught:
            weightload.load_into(target, path)
        assert (caught.value.filename, caught.value.tensor) == (str(path), tensor)
    with pytest.raises(errors.StateDictError) as strict:
        weightload.load_model(torch.nn.Linear(2, 2), path)
    assert strict.value.filename == str(path)


@pytest.mark.simulated
def test_a_target_on_several_devices(simulated: Any, checkpoint: Any) -> None:
    paths, state = checkpoint
    model = Model()
    model.layers[:6].to(DEVICE)
    model.layers[6:].to(OTHER)
    with settings.override(**SMALL):
        report = weightload.load_into(model, paths)
    assert_holds(model.state_dict(), state)
    assert sorted(report.stats) == ["cpu", DEVICE, OTHER]
    assert report.in_place == len(state)
    del model


@pytest.mark.simulated
def test_work_before_and_after_keeps_its_order(simulated: Any, checkpoint: Any) -> None:
    """Work that was queued before the load reads the old bytes, work after it reads the new ones. Nobody waits."""
    paths, state = checkpoint
    for seed in range(5):
        simulated.seed_delays(seed, longest_us=2000)
        for stream in (torch.accelerator.current_stream(0), torch.Stream(device=DEVICE)):
            with current_stream(stream), settings.override(**{**SMALL, "pinned_bytes": 4 << 20}):
                target = {name: torch.zeros_like(tensor).to(DEVICE) for name, tensor in state.items()}
                gate = simulated.hold_stream(0, stream.stream_id)
                before = {name: tensor.clone() for name, tensor in target.items()}
                threading.Timer(0.05, gate).start()  # a slot may be needed again
                weightload.load_into(target, paths)
                after = {name: tensor.clone() for name, tensor in target.items()}
                assert all(not tensor.cpu().any() for tensor in before.values())
                assert_holds(after, state)
                assert_holds(target, state)
                before.clear(), after.clear(), target.clear()


def test_an_error_on_the_way_is_raised_with_its_place(device: str, checkpoint: Any, arm: Callable[..., None]) -> None:
    paths, state = checkpoint
    evict(paths)
    model = Model().to(device)
    arm("error", first=3, count=10**6, error_number=errno.EIO)
    with pytest.raises(errors.ReadError) as caught:
        weightload.load_into(model, paths)
    assert (caught.value.errno, caught.value.tensor in state) == (errno.EIO, True)
    assert all(parameter._version > 0 for parameter in model.parameters())  # some of them have changed
    arm("interrupt", first=0, count=0)
    del caught
    gc.collect()
    weightload.load_into(model, paths)
    assert_holds(model.state_dict(), state)


def test_a_transposed_view_is_overlapping_memory(device: str, tmp_path: Path) -> None:
    """The one is plain, the other is not; the last in the target's order counts, whatever the order of the file."""
    state = {"a": torch.rand(300, 200), "b": torch.rand(200, 300)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    for names in (["a", "b"], ["b", "a"]):
        weight = torch.zeros(300, 200).to(device)
        views = {"a": weight, "b": weight.t()}
        weightload.load_into({name: views[name] for name in names}, tmp_path / "x.safetensors")
        assert torch.equal(views[names[1]].cpu(), state[names[1]])


class Wrapper(torch.Tensor):
    """A tensor around another, as quantised weights are: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [a.inner if isinstance(a, Wrapper) else a for a in args]
        result = func(*unwrapped, **(kwargs or {}))
        return args[0] if func is torch.ops.aten.copy_.default else result


def test_wrapped_tensors_are_not_taken_for_tied(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(4), "b": torch.full((4,), 2.0)}, tmp_path / "x.safetensors")
    inner = {"a": torch.zeros(4), "b": torch.zeros(4)}
    report = weightload.load_into({name: Wrapper(t) for name, t in inner.items()}, tmp_path / "x.safetensors")
    assert report.in_place == 0
    assert torch.equal(inner["a"], torch.ones(4))
    assert torch.equal(inner["b"], torch.full((4,), 2.0))


def test_freed_memory_is_refused(tmp_path: Path) -> None:
    """A parameter without memory is refused. Sharding libraries leave such parameters behind."""
    safetensors.torch.save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(errors.StateDictError, match="no memory"):
        weightload.load_into({"a": freed}, tmp_path / "x.safetensors")


def test_a_state_dict_that_is_made_on_the_fly_is_refused(tmp_path: Path) -> None:
    """A state_dict that a hook makes anew is refused: what is read into its tensors would be lost."""
    model = torch.nn.Linear(3, 3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors")
    model.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(weight=state["weight"].clone()))
    with pytest.raises(errors.StateDictError, match="on the fly"):
        weightload.load_into(model, tmp_path / "x.safetensors")


@pytest.mark.simulated
def test_a_failed_start_keeps_nothing(simulated: Any, checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(checkpoint[0][0].read_bytes()[:-1])
    with pytest.raises(errors.HeaderError) as caught:
        weightload.safetensors_weights_iterator([tmp_path / "bad.safetensors"], device=DEVICE)
    assert (simulated.pinned_bytes(), thread_count()) == (0, 0)  # while the exception lives
    del caught


def test_a_progress_bar(device: str, checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    paths, state = checkpoint
    weightload.load_into({name: torch.zeros_like(t).to(device) for name, t in state.items()}, paths, show_progress=True)
    assert "100%" in capsys.readouterr().err


def test_autograd_hears_of_it(checkpoint: Any) -> None:
    paths, _ = checkpoint
    model = Model()
    loss = (model.layers[0].weight * model.layers[0].weight).sum()
    weightload.load_into(model, paths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
