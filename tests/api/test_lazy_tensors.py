"""Tensors that are read in parts: what is read of them, and that they are what the tensors would be."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from weightload._parts.lazy import LazyTensor, Unread

CPU = torch.device("cpu")


def make(tensor: torch.Tensor, ahead: tuple[slice, ...] | None = None) -> tuple[LazyTensor, list[tuple[slice, ...]]]:
    """A stand-in for a tensor of a file, and the list of what is read of it."""
    reads: list[tuple[slice, ...]] = []

    def read(box: tuple[slice, ...]) -> torch.Tensor:
        reads.append(box)
        return tensor[box].clone()

    part = None
    if ahead is not None:
        ranges = tuple(
            ((s.start or 0, size if s.stop is None else s.stop),) for s, size in zip(ahead, tensor.shape, strict=True)
        )
        part = ranges, tensor[ahead].clone()
    return LazyTensor(Unread(tuple(tensor.shape), tensor.dtype, CPU, read, part)), reads


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.arange(48, dtype=torch.float32).reshape(8, 6)


def test_questions_read_nothing(matrix: torch.Tensor) -> None:
    lazy, reads = make(matrix)
    for ask in (
        lambda t: t.shape, lambda t: t.dtype, lambda t: t.ndim, lambda t: t.dim(), lambda t: t.numel(), len,
        lambda t: t.size(1), lambda t: t.device, lambda t: t.nbytes, lambda t: t.element_size(),
        lambda t: t.is_floating_point(), lambda t: t.is_contiguous(), lambda t: t.stride(), lambda t: t.requires_grad,
        lambda t: t.is_meta, lambda t: t.t().shape, lambda t: t[2:, 1].shape, lambda t: isinstance(t, torch.Tensor),
    ):  # fmt: skip
        assert ask(lazy) == ask(matrix)
    assert "shape" not in repr(lazy)
    assert reads == []


def test_strides_are_those_of_the_tensor(matrix: torch.Tensor) -> None:
    for view in (*VIEWS, lambda t: t.unsqueeze(0), lambda t: t.unsqueeze(-1)[2:4], lambda t: t.t().unsqueeze(1)):
        lazy, reads = make(matrix)
        ours, theirs = view(lazy), view(matrix)
        if isinstance(ours, LazyTensor):
            assert ours.is_contiguous() == theirs.is_contiguous()
            for at in range(ours.dim()):
                assert ours.size(at) == 1 or ours.numel() == 0 or ours.stride(at) == theirs.stride(at)
            assert reads == []


def test_contiguous_is_itself_where_it_is_so(matrix: torch.Tensor) -> None:
    lazy, _ = make(matrix)
    lazy[0:2].contiguous().zero_()
    assert float(lazy[0:2].sum()) == 0
    lazy.t().contiguous().zero_()
    assert float(lazy[2:].sum()) > 0


def test_threads_write_to_one_memory(matrix: torch.Tensor) -> None:
    """Rows of their own, at once: the first writes wait for one reading of all."""
    met = threading.Barrier(4)

    def read(box: tuple[slice, ...]) -> torch.Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(0.2)  # only others that read, too, come here
        return matrix[box].clone()

    lazy = LazyTensor(Unread((8, 6), torch.float32, CPU, read))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: lazy[2 * row : 2 * row + 2].fill_(-1.0), range(4)))
    assert bool((lazy == -1.0).all())


def test_splits_at_the_edge(matrix: torch.Tensor) -> None:
    lazy, _ = make(matrix)
    assert [one.shape for one in lazy.unsqueeze(0).split([0, 1], 0)] == [(0, 8, 6), (1, 8, 6)]
    for sizes in ([-1, 9], -3):
        with pytest.raises(RuntimeError):
            lazy.split(sizes)  # type: ignore[no-untyped-call]
    assert float(lazy[0, 1].transpose(0, 0)) == float(matrix[0, 1])


VIEWS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.narrow(0, 2, 3), lambda t: t.narrow(1, 2, 3), lambda t: t.narrow(-1, 1, 2), lambda t: t[3],
    lambda t: t[-1],
    lambda t: t[2:5], lambda t: t[:, 1:4], lambda t: t[2:4, 1:3], lambda t: t[..., 2], lambda t: t[1, 2],
    lambda t: t[-3:],
    lambda t: t[5:3], lambda t: t.t(), lambda t: t.T.narrow(0, 1, 2), lambda t: t.mT[1:3],
    lambda t: t.transpose(0, 1)[2],
    lambda t: t.permute(1, 0).narrow(1, 4, 4), lambda t: t.chunk(3)[1], lambda t: t.split(3)[2],
    lambda t: t.detach()[1:],
    lambda t: t.split([2, 6])[1], lambda t: t.split(2, dim=1)[1], lambda t: t.unbind(1)[3], lambda t: list(t)[4],
    lambda t: t.data.narrow(0, 4, 4).narrow(0, 1, 2), lambda t: t.unsqueeze(0)[0][2:3],
    lambda t: t.unsqueeze(-1)[1:3],
    lambda t: t[:, None, 1:2], lambda t: t[None].narrow(1, 0, 4), lambda t: t.tensor_split(3, dim=1)[0],
    lambda t: t.select(1, 2),
    lambda t: t.unsqueeze(1).transpose(0, 2)[3:, :, 2],
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_no_more_is_read_than_the_view(matrix: torch.Tensor, number: int, mode: Callable[[], Any]) -> None:
    lazy, reads = make(matrix)
    with mode():
        view, expected = VIEWS[number](lazy), VIEWS[number](matrix)
        assert reads == []
        assert view.shape == expected.shape
        target = torch.zeros(expected.shape)
        target.copy_(view)
    assert torch.equal(target, expected)
    assert len(reads) == 1
    assert matrix[reads[0]].numel() == expected.numel()


OTHERS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t + 1, lambda t: t.view(-1), lambda t: t.reshape(4, 12), lambda t: t.view(torch.int32),
    lambda t: t[::2],
    lambda t: t[[1, 3]], lambda t: t[t > 5], lambda t: t.numpy(), lambda t: t.tolist(), lambda t: t.to(torch.float64),
    lambda t: t.sum().item(), lambda t: torch.cat([t, t]), lambda t: t.expand(2, 8, 6), lambda t: t.flatten(1),
    lambda t: t.flip(0),
    lambda t: copy.deepcopy(t), lambda t: pickle.loads(pickle.dumps(t)), lambda t: t.clone(), lambda t: t.bfloat16(),
    lambda t: torch.from_dlpack(t), lambda t: torch.as_tensor(t), lambda t: torch.nn.functional.pad(t, (1, 1)),
    lambda t: t.unfold(0, 2, 2), lambda t: t.as_strided((2, 2), (1, 3)),
    lambda t: t.untyped_storage().nbytes(), lambda t: t.apply_(abs), lambda t: t.contiguous(), lambda t: t.roll(1),
    lambda t: torch.ops.aten.mul(t, 2), lambda t: t.index_select(0, torch.tensor([1])), lambda t: t.squeeze(),
    lambda t: t == t, lambda t: t.max(), lambda t: t.type(torch.float16), lambda t: t.t().contiguous().chunk(2)[1],
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_anything_else_is_done_with_the_tensor(matrix: torch.Tensor, number: int, mode: Callable[[], Any]) -> None:
    lazy, _ = make(matrix)
    with mode():
        found, expected = OTHERS[number](lazy), OTHERS[number](matrix.clone())
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(torch.empty_like(expected).copy_(found), expected)
    else:
        assert str(found) == str(expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1), lambda t: t.narrow(0, 2, 3).mul_(3), lambda t: t.t()[1].zero_(), lambda t: t.fill_(7),
        lambda t: t.__setitem__((slice(1, 3), 2), 5.0), lambda t: t.copy_(torch.ones(8, 6)),
        lambda t: t.view(-1)[3:9].neg_(),
        lambda t: torch.add(t, t, out=t), lambda t: t[2].numpy().fill(3), lambda t: t.chunk(2)[1].exp_(),
        lambda t: t.T.clamp_(max=9),
        lambda t: torch.ops.aten.sub_(t.unsqueeze(0), 1), lambda t: t[::2].mul_(5),
    ],
)  # fmt: skip
def test_what_is_written_shows_in_all_views(matrix: torch.Tensor, write: Callable[[torch.Tensor], Any]) -> None:
    """Also in one of before, of which nothing had been read, and not in the file."""
    lazy, _ = make(matrix)
    before = lazy.narrow(1, 1, 4)
    expected = matrix.clone()
    assert torch.equal(torch.zeros(2, 6).copy_(lazy[:2]), expected[:2])
    write(lazy)
    write(expected)
    for one, other in ((lazy, expected), (before, expected.narrow(1, 1, 4)), (lazy[2:5], expected[2:5])):
        assert torch.equal(one.clone(), other)
    assert not torch.equal(expected, matrix)


def test_a_write_gives_back_what_it_was_given(matrix: torch.Tensor) -> None:
    lazy, _ = make(matrix)
    assert lazy.copy_(matrix + 1) is lazy
    target = torch.zeros(8, 6)
    assert target.copy_(lazy) is target
    assert torch.equal(target, matrix + 1)


def test_what_is_there_ahead_is_not_read_again(matrix: torch.Tensor) -> None:
    lazy, reads = make(matrix, ahead=(slice(2, 6), slice(None)))
    assert torch.equal(lazy[3:5].clone(), matrix[3:5])
    assert reads == []
    assert torch.equal(lazy[5:7].clone(), matrix[5:7])
    assert reads == [(slice(5, 7), slice(0, 6))]
    assert torch.equal(lazy.sum(), matrix.sum())
    assert reads[1:] == [(slice(0, 8), slice(0, 6))]


def test_a_copy_into_a_parameter_of_another_class(matrix: torch.Tensor) -> None:
    """Engines have such, which see every function of torch, and decline what they do not know."""

    class Parameter(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(function, types, args, kwargs or {})

    parameter = Parameter(torch.zeros(4, 6), requires_grad=False)
    lazy, reads = make(matrix)
    parameter.data.copy_(lazy.narrow(0, 4, 4))
    parameter[:2].copy_(lazy[4:6])
    assert torch.equal(parameter.data, matrix[4:])
    assert all(box[0].start >= 4 for box in reads)


def test_attributes_that_cannot_be_set(matrix: torch.Tensor) -> None:
    lazy, _ = make(matrix)
    lazy.shard_id = "q"  # of its own, as of any tensor
    assert lazy.shard_id == "q"
    with pytest.raises(RuntimeError, match="data of a tensor that is read in parts"):
        lazy.data = matrix
    target = torch.nn.Parameter(torch.zeros(8, 6), requires_grad=False)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match="incompatible tensor type"):
            target.data = lazy
    with pytest.raises(RuntimeError, match="Creating a Parameter"):
        torch.nn.Parameter(lazy)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.select(0, 8), lambda t: t.select(0, -9), lambda t: t.select(2, 0), lambda t: t.narrow(0, 5, 4),
        lambda t: t[8],
        lambda t: t.narrow(1, -7, 1), lambda t: t.transpose(0, 2), lambda t: t.permute(0, 0),
        lambda t: t.unsqueeze(3), lambda t: t.view(7),
        lambda t: t.split([2, 2]), lambda t: t.unbind(2), lambda t: t[0, 0, 0], lambda t: t.split(0),
        lambda t: t[0].t()[0].t()[0],
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_what_torch_refuses(
    matrix: torch.Tensor, wrong: Callable[[torch.Tensor], Any], mode: Callable[[], Any]
) -> None:
    lazy, _ = make(matrix)
    with mode():
        with pytest.raises((RuntimeError, IndexError)) as expected:
            wrong(matrix)
        with pytest.raises((RuntimeError, IndexError)) as found:
            wrong(lazy)
    assert found.type is expected.type


def test_a_contiguous_copy_is_read_once(matrix: torch.Tensor) -> None:
    lazy, reads = make(matrix)
    pieces = lazy[:, :4].contiguous().chunk(4)
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in matrix[:, :4].chunk(4)]
    assert reads == [(slice(0, 8), slice(0, 4))]
