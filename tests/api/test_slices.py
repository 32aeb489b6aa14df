"""Slices of tensors in a file: torch's indexing, reading no rows but those it needs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS, evict, interrupted_after, write_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.indexing import ADVANCED, BASIC, WRONG, masks
from support.torch_modes import MODES, described
from torch._subclasses.fake_tensor import FakeTensorMode

import weightload
from weightload import _C
from weightload._parts.rows import plan_rows


@pytest.fixture(autouse=True)
def no_cycles() -> Iterator[None]:
    """Exceptions that are compared hold frames, and these handles."""
    yield
    gc.collect()


LARGE = [5000, 700]  # F32, 14 MB: loaded by threads


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [
        ("matrix", "I32", [7, 5]), ("cube", "F16", [4, 3, 6]), ("vector", "I64", [9]), ("none", "F32", [0, 3]),
        ("scalar", "F64", []), ("byte", "U8", [3, 3]), ("odd", "I32", [6, 3]), ("large", "F32", LARGE),
    ]  # fmt: skip
    return write_tensors(tmp_path_factory.mktemp("slices") / "s.safetensors", tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indexing_is_torchs(sliced: Path, backend: Any) -> None:
    whole = weightload.load_file(sliced)
    with weightload.safe_open(sliced, backend=backend) as file:
        for name in ("matrix", "cube", "vector", "none", "scalar", "byte", "odd"):
            tensor, part = whole[name], file.get_slice(name)
            own = masks(list(tensor.shape)) if tensor.ndim > 1 else []
            for index in [*BASIC, *ADVANCED, *WRONG, *own]:
                assert_like(lambda i, p=part: p[i], tensor, index)


def assert_like(pick: Callable[[Any], torch.Tensor], tensor: torch.Tensor, index: Any) -> None:
    """Require that ``pick`` gives the tensor that torch's indexing gives, or an error of the same type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = tensor[index]
        except Exception as error:
            with pytest.raises(type(error)):
                pick(index)
            return
        got = pick(index)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), index
    assert torch.equal(bits(got), bits(wanted)), index


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as whole numbers: copies of truth values may change their bytes, and NaN is not equal to itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def indices(shape: list[int]) -> st.SearchStrategy[Any]:
    """Tuples of what torch takes, most of them fitting."""
    bound = st.none() | st.integers(-9, 9)
    whole = st.integers(-8, 8)
    part = st.builds(slice, bound, bound, st.none() | st.integers(1, 4))
    tensor = st.lists(st.integers(-4, 3), max_size=4).map(lambda rows: torch.tensor(rows, dtype=torch.long))
    mask = st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]).map(torch.tensor)
    some = st.one_of(whole, part, part, tensor, mask, st.none(), st.just(...))
    return st.lists(some, max_size=len(shape) + 1).map(tuple) | some


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_index(sliced: Path, backend: Any, data: st.DataObject) -> None:
    with weightload.safe_open(sliced, backend=backend) as file:
        for name in ("matrix", "cube", "vector"):
            tensor = file.get_tensor(name)
            part = file.get_slice(name)
            assert_like(lambda i, p=part: p[i], tensor, data.draw(indices(list(tensor.shape))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cold", [True, False])
def test_large_tensors(sliced: Path, backend: Any, cold: bool) -> None:
    tensor = weightload.load_file(sliced, backend="pread")["large"]
    several = [
        slice(None), slice(10, 4500), slice(0, None, 2), (slice(1, 4999), slice(3, 50)), [4999, 3, 3, 2000], 77,
        (..., 5), torch.arange(4900), torch.arange(5000) % 3 == 0, (None, slice(1, 4800)),
    ]  # fmt: skip
    with weightload.safe_open(sliced, backend=backend) as file:
        part = file.get_slice("large")
        for index in several:
            if cold:
                evict([sliced])
            assert_like(lambda i: part[i], tensor, index)


def bytes_read() -> int:
    """Bytes that this process has read with system calls."""
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(10, 20), 10),
        (slice(0, 5000, 1000), 5),
        (4000, 1),
        (([7, 4999, 7], slice(2)), 2),
        ((slice(100, 200), 5), 100),
        ((..., slice(4)), 5000),
        (slice(3, 3), 0),
        (torch.arange(5000) == 17, 1),
        ((None, slice(1, 3)), 2),
    ],
    ids=str,
)
def test_only_the_rows_that_are_needed_are_read(sliced: Path, index: Any, rows: int) -> None:
    with weightload.safe_open(sliced, backend="pread") as file:
        part = file.get_slice("large")
        part[0]
        before = bytes_read()
        part[index]
        read = bytes_read() - before
    assert read < rows * 2800 + 4096
    if rows < 5000:  # columns may be copied out of the page cache, without read calls
        assert rows * 2800 <= read


def test_a_slice_does_not_keep_what_it_was_cut_from(sliced: Path) -> None:
    with weightload.safe_open(sliced, backend="pread") as file:
        column = file.get_slice("large")[:, 3]
    assert column.untyped_storage().nbytes() == 5000 * 4


def test_slices_outlive_their_handle(sliced: Path) -> None:
    for backend in BACKENDS:
        handle = weightload.safe_open(sliced, backend=backend)  # type: ignore[arg-type]
        part, want = handle.get_slice("matrix"), handle.get_tensor("matrix").clone()
        with handle:
            pass
        del handle
        gc.collect()
        assert torch.equal(part[2:], want[2:])


def test_slices_that_lie_apart_are_views_of_one_mapping(tmp_path: Path) -> None:
    """Slices such as fused query, key and value share a mapping. One that overlaps another has memory of its own."""
    path = write_tensors(tmp_path / "aligned.safetensors", [("large", "F32", LARGE)])
    with weightload.safe_open(path) as file:
        part = file.get_slice("large")
        second, first, third = part[1000:2000], part[:1000], part[2000:5000:2]
        assert second.data_ptr() - first.data_ptr() == 1000 * 2800
        assert third.data_ptr() - second.data_ptr() == 1000 * 2800
        again = part[1999:2001]
        assert not second.data_ptr() <= again.data_ptr() < third.data_ptr() + third.nbytes
        second.zero_()
        assert torch.equal(bits(again), bits(weightload.load_file(path)["large"][1999:2001]))


def test_packed_and_float8(all_dtypes: Path) -> None:
    whole = weightload.load_file(all_dtypes)
    for backend in BACKENDS:
        with weightload.safe_open(all_dtypes, backend=backend) as file:  # type: ignore[arg-type]
            for name, tensor in whole.items():
                if tensor.ndim and tensor.shape[0] and name != "F4.vector":
                    for index in (slice(1, None), slice(0, None, 2), -1, (slice(1),)):
                        assert_like(lambda i, n=name: file.get_slice(n)[i], tensor, index)


def test_pairs_of_f4_are_not_cut_by_elements(all_dtypes: Path) -> None:
    """The header counts elements, torch pairs: whoever halves the header's shape would get nothing."""
    with weightload.safe_open(all_dtypes) as file:
        part = file.get_slice("F4.matrix")
        assert part.get_shape() == [3, 8]
        for index in ((slice(None), slice(4, None)), (..., 0), (0, 1), (slice(None), [0])):
            with pytest.raises(IndexError, match="torch counts pairs"):
                part[index]
        for index in ((0, slice(None)), (..., slice(None)), (slice(1, 3), ...), [0, 2]):
            if isinstance(index, tuple):
                assert part[index].shape[-1] == 4
        with pytest.raises(IndexError, match="torch counts pairs"):
            file.get_slice("F4.vector")[2:]


def test_the_plan_of_rows() -> None:
    def runs(index: Any, shape: list[int], row_bytes: int = 4097) -> Any:
        found = plan_rows(index, shape, row_bytes).runs
        return None if found is None else list(map(list, found))

    assert runs(slice(2, 5), [9, 2]) == [[2, 5]]
    assert runs(slice(2, 8, 3), [9, 2]) == [[2, 3], [5, 6]]
    assert runs([4, 3, 0, 4], [9]) == [[0, 1], [3, 5]]
    assert runs((..., 1), [9, 2]) is None
    assert runs((..., 1), [9]) == [[1, 2]]
    assert runs(torch.tensor([[True, False], [False, False], [False, True]]), [3, 2]) == [[0, 1], [2, 3]]
    # Less than a page between them: read together.
    assert runs(slice(0, 1_000_000, 2), [1_000_000, 8], 32) == [[0, 999_999]]
    assert runs(slice(0, 10, 3), [10], 2048) == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert runs(slice(0, 10, 3), [10], 2047) == [[0, 10]]
    assert runs(torch.arange(1_000_000) % 2 == 0, [1_000_000, 8], 32) == [[0, 999_999]]
    assert runs([0, 500, 2], [1000], 32) == [[0, 3], [500, 501]]
    assert runs([0, 5], [9, 0], 0) == [[0, 6]]


def test_an_interrupt_is_felt_between_rows(sliced: Path, arm: Callable[..., None]) -> None:
    rows = list(range(0, 5000, 500))
    with weightload.safe_open(sliced, backend="pread") as file:
        arm("delay", count=10**6, delay_ms=110)
        with interrupted_after(0.01), pytest.raises(KeyboardInterrupt):
            file.get_slice("large")[rows]
        assert _C.reads_since_armed() < len(rows)


def test_errors_name_the_tensor(sliced: Path, arm: Callable[..., None]) -> None:
    for backend, name in (("pread", "matrix"), ("pread", "large"), ("mmap", "large")):
        evict([sliced])
        with weightload.safe_open(sliced, backend=backend) as file:  # type: ignore[arg-type]
            arm("error", count=10**6, error_number=5)
            with pytest.raises(weightload.ReadError) as caught:
                file.get_slice(name)[1:4000]
            _C.disarm_fault()
        assert (caught.value.errno, caught.value.tensor, caught.value.filename) == (5, name, str(sliced))
        assert caught.value.offset is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_that_is_not_plain_is_torchs_to_judge(sliced: Path, backend: Any) -> None:
    """Fake, on the meta device, an inference tensor, of a subclass."""
    with FakeTensorMode():
        fake = torch.tensor([1, 2])
    with torch.inference_mode():
        inference = torch.tensor([1, 2])
    whole = weightload.load_file(sliced)["matrix"]
    with weightload.safe_open(sliced, backend=backend) as file:
        part = file.get_slice("matrix")
        for mode in ("no_grad", "FakeTensorMode", "device meta", "inference mode"):
            for index in (fake, torch.empty(2, dtype=torch.long, device="meta"), (slice(2), fake)):
                assert MODES[mode](lambda: kind_of(part, index)) == kind_of(whole, index)  # noqa: B023
            assert described(MODES[mode](lambda: part[inference])) == described(whole[inference])
            assert described(MODES[mode](lambda: part[OF_A_SUBCLASS])) == described(whole[OF_A_SUBCLASS])


def kind_of(indexed: Any, index: Any) -> Any:
    try:
        got = indexed[index]
    except Exception as error:
        return type(error)
    return type(got), got.device


class Indices(torch.Tensor):
    """A subclass that does nothing of its own."""


OF_A_SUBCLASS = torch.tensor([1, 2]).as_subclass(Indices)


def read_so_far() -> int:
    """Bytes that this process has got from read calls."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("index", "most"),
    [
        ((slice(None), slice(256, 512)), 1.0),  # an eighth, 1 KiB a row
        ((slice(1024, 4096), slice(-256, None)), 1.0),
        ((slice(None), slice(0, 1024)), 2.0),  # halves are read with what lies between them
        ((slice(None), slice(100, 100)), 0.0),
    ],
)
def test_columns_of_a_cold_tensor_are_read_without_the_others(
    backend: Any, index: Any, most: float, tmp_path: Path
) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("a", "U8", [8]), ("x", "F32", [4096, 2048])])
    with weightload.safe_open(path, backend=backend) as handle:
        whole = handle.get_tensor("x")[index].clone()
        evict([path])
        part = handle.get_slice("x")
        before = read_so_far()
        got = part[index]
        read = read_so_far() - before
    assert torch.equal(got.view(torch.int32), whole.view(torch.int32))
    assert got.is_contiguous() or backend == "mmap"
    if whole.nbytes:
        assert read <= most * whole.nbytes + (64 << 10)  # and what the kernel says of itself
