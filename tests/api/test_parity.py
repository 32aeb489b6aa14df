"""Bit for bit what safetensors gives: every dtype, shape and size, from both backends and from memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TORCH_DTYPES, write_tensors
from safetensors import safe_open

import weightload
from weightload import errors, settings

BACKENDS = ["mmap", "pread"]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(ours: dict[str, torch.Tensor], path: Path) -> None:
    reference = safetensors.torch.load_file(path)
    assert set(ours) == set(reference)
    for name, tensor in ours.items():
        other = reference[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.is_contiguous()
        assert torch.equal(raw(tensor), raw(other)), name


def all_ways(path: Path) -> list[dict[str, torch.Tensor]]:
    loads = [weightload.load_file(path, backend=backend) for backend in BACKENDS]  # type: ignore[arg-type]
    loads += [dict(weightload.safetensors_weights_iterator([path], to_cpu=True, backend=b)) for b in BACKENDS]  # type: ignore[arg-type]
    return [*loads, weightload.load(path.read_bytes())]


def test_every_dtype(all_dtypes: Path) -> None:
    for ours in all_ways(all_dtypes):
        assert len(ours) == 4 * len(TORCH_DTYPES) - 1
        assert_same(ours, all_dtypes)


def test_the_real_checkpoint(real_checkpoint: Path) -> None:
    for ours in all_ways(real_checkpoint):
        assert_same(ours, real_checkpoint)


@pytest.mark.parametrize("shift", range(8))
def test_odd_offsets_are_aligned_to_their_dtype(tmp_path: Path, shift: int) -> None:
    """Headers of any length, and tensors of mixed sizes: nothing lies where its dtype would like it."""
    path = tmp_path / "odd.safetensors"
    tensors = [
        ("x" * (shift + 1), "U8", [shift + 1]),
        ("a", "F32", [5]),
        ("b", "BOOL", [3]),
        ("c", "F64", [7, 1]),
    ]
    write_tensors(path, [*tensors, ("d", "BF16", [1]), ("e", "C64", [2]), ("f", "I16", [9])], pad_to=1)
    for ours in all_ways(path):
        assert_same(ours, path)
        for tensor in ours.values():
            assert tensor.data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_tensor_among_small_ones(tmp_path: Path, backend: str) -> None:
    """Over 64 MiB: larger than a block, than a task, and than the window."""
    path = tmp_path / "large.safetensors"
    small = [(f"small.{i}", "BF16", [17]) for i in range(100)]
    write_tensors(path, [*small, ("large", "F32", [18_000_001]), ("last", "U8", [1])])
    assert_same(weightload.load_file(path, backend=backend), path)  # type: ignore[arg-type]
    with settings.override(window_bytes=4096, task_bytes=1 << 20, threads=5):
        assert_same(weightload.load_file(path, backend=backend), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task_bytes", [4096, 5000, 65536])
def test_any_cutting_gives_the_same_bytes(
    all_dtypes: Path, real_checkpoint: Path, backend: str, task_bytes: int
) -> None:
    for path in (all_dtypes, real_checkpoint):
        with settings.override(task_bytes=task_bytes, block_bytes=10_000, threads=4, window_bytes=100_000):
            assert_same(weightload.load_file(path, backend=backend), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_is_files_then_offsets(tmp_path: Path, backend: str) -> None:
    first = write_tensors(tmp_path / "z.safetensors", [("c", "U8", [3]), ("a", "U8", [0]), ("b", "U8", [2])])
    second = write_tensors(tmp_path / "a.safetensors", [("e", "U8", [1]), ("d", "F32", [1])])
    weights = weightload.safetensors_weights_iterator([first, second], to_cpu=True, backend=backend)  # type: ignore[arg-type]
    assert [name for name, _ in weights] == ["c", "a", "b", "e", "d"]


def test_an_empty_checkpoint(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "none.safetensors", [])
    assert all(ours == {} for ours in all_ways(path))
    assert list(weightload.safetensors_weights_iterator([], to_cpu=True)) == []


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_torch_lacks_fails_at_its_tensor_by_name(tmp_path: Path, dtype: str) -> None:
    path = write_tensors(
        tmp_path / "f6.safetensors", [("good", "U8", [1]), ("bad.weight", dtype, [8]), ("more", "U8", [1])]
    )
    weights = iter(weightload.safetensors_weights_iterator([path], to_cpu=True))
    assert next(weights)[0] == "good"
    with pytest.raises(errors.TensorError, match=dtype) as caught:
        next(weights)
    assert (caught.value.tensor, caught.value.filename) == ("bad.weight", str(path))
    weights.close()  # type: ignore[attr-defined]


def test_f4_with_an_odd_last_dimension_fails_by_name(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "f4.safetensors", [("odd", "F4", [2, 3])])
    with pytest.raises(errors.TensorError, match="divisible by 2"):
        weightload.load_file(path)


def test_a_dimension_beyond_torch_fails_by_name(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "wide.safetensors", [("wide", "U8", [0, 2**63])])
    with pytest.raises(errors.TensorError, match=str(2**63)):
        weightload.load_file(path)


@pytest.mark.parametrize("shape", [[0, 2**61, 4], [0, 2**31, 2**32], [3, 0, 2**62, 2]])
def test_strides_beyond_torch_fail_by_name(tmp_path: Path, shape: list[int]) -> None:
    path = write_tensors(tmp_path / "long.safetensors", [("long", "U8", shape)])
    with pytest.raises(RuntimeError, match="overflow"):
        safetensors.torch.load_file(path)
    for load in (weightload.load_file, lambda path: weightload.load(path.read_bytes())):
        with pytest.raises(errors.TensorError, match="overflow") as caught:
            load(path)
        assert caught.value.tensor == "long"


@pytest.mark.parametrize("shape", [[0, 2**62, 4], [0, 2**40, 2**40], [2**61, 4, 0], [0, 2**63 - 1]])
def test_other_strides_of_empty_tensors_do_not_matter(tmp_path: Path, shape: list[int]) -> None:
    path = write_tensors(tmp_path / "empty.safetensors", [("empty", "U8", shape)])
    for ours in all_ways(path):
        assert_same(ours, path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_has_a_storage_of_its_own(real_checkpoint: Path, tmp_path: Path, backend: str) -> None:
    """Saving one must not save its neighbours, and nothing may look tied that is not."""
    ours = weightload.load_file(real_checkpoint, backend=backend)  # type: ignore[arg-type]
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.storage_offset() == 0 for t in ours.values())
    safetensors.torch.save_file(ours, tmp_path / "again.safetensors")  # refuses tensors that share memory
    assert_same(ours, tmp_path / "again.safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
def test_writing_to_a_tensor_stays_in_the_process(tmp_path: Path, backend: str) -> None:
    path = write_tensors(tmp_path / "w.safetensors", [("a", "F32", [2048]), ("b", "F32", [2048])])
    before = path.read_bytes()
    ours = weightload.load_file(path, backend=backend)  # type: ignore[arg-type]
    other = ours["b"].clone()
    ours["a"].fill_(1.0)
    ours["a"].add_(1.0)
    assert ours["a"].eq(2.0).all()
    assert torch.equal(raw(ours["b"]), raw(other))
    assert path.read_bytes() == before
    again = weightload.load_file(path, backend=backend)  # type: ignore[arg-type]
    assert not again["a"].eq(2.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_outlive_everything(tmp_path: Path, backend: str) -> None:
    path = write_tensors(tmp_path / "gone.safetensors", [(f"t{i}", "F32", [100_000]) for i in range(20)])
    reference = safetensors.torch.load(path.read_bytes())
    weights = weightload.safetensors_weights_iterator([path], to_cpu=True, backend=backend)  # type: ignore[arg-type]
    kept = dict(weights)
    del weights
    path.unlink()
    assert all(torch.equal(raw(kept[name]), raw(tensor)) for name, tensor in reference.items())
    last = kept.pop("t7")
    kept.clear()
    assert torch.equal(raw(last), raw(reference["t7"]))


def test_ordinary_tensors_in_every_respect(real_checkpoint: Path) -> None:
    name, tensor = next(iter(weightload.load_file(real_checkpoint).items()))
    with safe_open(real_checkpoint, framework="pt") as file:
        other = file.get_tensor(name)
    assert type(tensor) is torch.Tensor
    assert tensor.requires_grad == other.requires_grad
    assert tensor.is_leaf
    assert tensor.stride() == other.stride()
    grown = torch.nn.Parameter(tensor.float())
    (grown * 2).sum().backward()
    assert grown.grad is not None
    with torch.inference_mode():  # unlike safetensors', they can be trained afterwards
        assert not weightload.load_file(real_checkpoint)[name].is_inference()


def test_load_takes_other_bytes_like_objects(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("a", "I32", [100])])
    data = bytearray(path.read_bytes())
    ours = weightload.load(memoryview(data))  # type: ignore[arg-type]
    data[-400:] = bytes(400)  # the tensors have their own memory
    assert_same(ours, path)
