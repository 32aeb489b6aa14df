"""torch's modes, contexts and defaults change nothing in a load, nor a load in them: every call in each of them."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TESTS, run_script, write_tensors
from support.indexing import ADVANCED, BASIC, WRONG, masks
from support.torch_modes import MODES, described, look_around, modes_here, refuse, undisturbed

import weightload
from weightload import _C

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
# bytes: loaders take over from 8 MiB on
LARGE = 9 << 20


@pytest.fixture(scope="module", autouse=True)
def only_what_is_new_is_looked_through() -> None:
    """Freeze what earlier tests left: it takes each of a thousand garbage collections a fifth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_cycles() -> Iterator[None]:
    """Exceptions that are compared hold frames, and these handles."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small, with a tensor of many kinds; large, and large with a misaligned tensor; and one that ends too early."""
    folder = tmp_path_factory.mktemp("modes")
    small = [
        ("matrix", "F32", [6, 5]), ("half", "BF16", [40, 3]), ("bool", "BOOL", [9]), ("scalar", "F64", []),
        ("one", "F32", [1]), ("empty", "F32", [0, 4]), ("packed", "F4", [3, 8]), ("complex", "C64", [2, 2]),
        ("rows", "I64", [3000, 9]),
    ]  # fmt: skip
    large = [*small, ("large", "F32", [LARGE // 4096, 1024])]
    return {
        "small": write_tensors(folder / "small.safetensors", small),
        "large": write_tensors(folder / "large.safetensors", large),
        "odd": write_tensors(folder / "odd.safetensors", [("byte", "U8", [3]), *large], pad_to=1),
    }


def iterated(path: Path, **options: Any) -> Tensors:
    """Return what the iterator yields. Between two tensors the modes must be the user's."""
    options = {"to_cpu": True, "show_progress": False, **options}
    here, got = look_around(), {}
    for name, tensor in weightload.safetensors_weights_iterator([path], **options):
        assert look_around() == here
        got[name] = tensor
    return got


def with_names(path: Path) -> Tensors:
    """A predicate is the user's code."""
    here, seen = look_around(), []
    got = iterated(path, names=lambda name: seen.append(look_around()) or name != "half")  # type: ignore[func-returns-value]
    assert all(one == here for one in seen)
    assert len(got) == len(seen) - 1
    return got


def each_tensor(path: Path, backend: Any) -> Tensors:
    with weightload.safe_open(path, backend=backend) as file:
        again = {f"{name} again": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {**{name: file.get_tensor(name) for name in file.keys()}, **again}  # noqa: SIM118


def all_tensors(path: Path, backend: Any) -> Tensors:
    with weightload.safe_open(path, backend=backend) as file:
        return file.get_tensors()


INDICES = {
    "small": {
        "matrix": [*BASIC, *ADVANCED, *WRONG, *masks([6, 5])],
        "rows": [
            slice(5, 9), slice(None, None, 1000), [0, 2999, 7], torch.tensor([[1, 2], [2500, -1]]),
            np.array([5, 1]), (slice(None), 3), torch.arange(3000) % 700 == 0, (torch.tensor([1, 2]), torch.tensor(3)),
        ],
        "bool": BASIC[:9], "scalar": [..., ()], "empty": [slice(None), 0], "packed": [1, [0, 2]],
    },
    "large": {
        "large": [
            slice(None), slice(1, 2200), slice(None, None, 3), slice(0, 9), (slice(None), slice(2, 9)), 5,
            [0, 1000, 3], (torch.tensor([7, 1]), 3), torch.arange(LARGE // 4096) % 2 == 0,
            torch.arange(LARGE // 4096) // 1200 % 2 == 0,
        ]
    },
}  # fmt: skip


def slices(path: Path, backend: Any) -> dict[str, Any]:
    got: dict[str, Any] = {}
    with weightload.safe_open(path, backend=backend) as file:
        for name, indices in INDICES[path.stem].items():
            for number, index in enumerate(indices):
                try:
                    got[f"{name}[{number}]"] = file.get_slice(name)[index]
                except Exception as error:
                    got[f"{name}[{number}]"] = type(error), str(error)
    return got


def prefetched(path: Path, **options: Any) -> Tensors:
    with weightload.safe_open(path) as file, file.prefetch(**options) as loader:
        here, first = look_around(), loader.names()[0]
        got = {first: loader.take(first)}
        for name, tensor in loader:
            assert look_around() == here
            got[name] = tensor
        return got


class Into:
    """Targets of every kind, made outside of the modes; what is in them afterwards."""

    def __init__(self) -> None:
        memory, twice = torch.zeros(60), torch.zeros(6, 5)
        self.into: Tensors = {
            "matrix": torch.zeros(5, 6).t(),  # not contiguous
            "half": torch.zeros(40, 3, dtype=torch.float64),  # a cast
            "bool": torch.zeros(9, dtype=torch.bool),
            "scalar": torch.nn.Parameter(torch.zeros((), dtype=torch.float64)),
            "one": torch.zeros(()),  # of [1]
            "empty": torch.zeros(0, 4),
            "complex": torch.zeros(2, 2, dtype=torch.complex64),
            "rows": torch.zeros(3000, 9, dtype=torch.int64),
            "large": torch.nn.Parameter(torch.zeros(LARGE // 4096, 1024)),
            "packed": torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        }
        self.overlapping: Tensors = {"matrix": memory[:30].view(6, 5), "one": memory[29:30]}
        self.tied: Tensors = {"matrix": twice, "other": twice}

    def __call__(self, path: Path) -> Tensors:
        report = weightload.load_into(self.into, path, strict=False, show_progress=False)
        assert report.in_place == 7 + ("large" in report.loaded)
        weightload.load_into(self.overlapping, path, strict=False)
        weightload.load_into(self.tied, path, strict=False)
        parts = {"into": self.into, "overlapping": self.overlapping, "tied": self.tied}
        return {f"{kind} {name}": tensor for kind, part in parts.items() for name, tensor in part.items()}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))  # a cast
        self.one = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("rows", torch.zeros(3000, 9, dtype=torch.int64))


class IntoModel:
    def __init__(self, load: Callable[..., Any]) -> None:
        self.model, self.load = Model(), load

    def __call__(self, path: Path) -> Tensors:
        self.load(self.model, path, strict=False)
        return dict(self.model.state_dict(keep_vars=True))


class Own(torch.Tensor):
    """A class with a ``copy_`` of its own, which knows no modes."""

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:
        assert modes_here() == []
        return super().copy_(source.to(torch.float64) + 1)


class IntoOwn:
    def __init__(self) -> None:
        self.target = {"matrix": torch.zeros(6, 5).as_subclass(Own), "rows": torch.zeros(3000, 9).as_subclass(Own)}

    def __call__(self, path: Path) -> Tensors:
        weightload.load_into(self.target, path, strict=False)
        return self.target


class Hooked:
    """A module that is copied to, parts of it one over the other, and whose hooks after loading are the user's code."""

    def __init__(self) -> None:
        self.model, memory = Model(), torch.zeros(60)
        self.model.child = torch.nn.Module()
        self.model.child.mine = torch.nn.Parameter(memory[:30].view(6, 5))
        self.model.one = torch.nn.Parameter(memory[29:30])
        self.model.matrix = torch.nn.Parameter(memory[5:35].view(6, 5))
        self.around: list[Any] = []
        for part in self.model.modules():
            part.register_load_state_dict_post_hook(lambda *_: self.around.append(look_around()))

    def __call__(self, path: Path) -> Tensors:
        here = look_around()
        weightload.load_into(self.model, path, strict=False)
        assert self.around == [here, here]
        return dict(self.model.state_dict(keep_vars=True))


# Each is made outside of the modes, and called in them.
CALLS: dict[str, Callable[[], Callable[[Path], Any]]] = {
    "iterator": lambda: iterated,
    "iterator, pread": lambda: lambda path: iterated(path, backend="pread"),
    "iterator, names": lambda: with_names,
    "iterator, progress": lambda: lambda path: iterated(path, show_progress=True),
    "iterator, device": lambda: lambda path: iterated(path, device="cpu", to_cpu=False),
    "iterator, broadcast": lambda: lambda path: iterated(path, strategy="broadcast"),
    "load_file": lambda: weightload.load_file,
    "load_file, pread": lambda: lambda path: weightload.load_file(path, backend="pread"),
    "load_file, device": lambda: lambda path: weightload.load_file(path, CPU),
    "load": lambda: lambda path: weightload.load(path.read_bytes()),
    "get_tensor": lambda: lambda path: each_tensor(path, "mmap"),
    "get_tensor, pread": lambda: lambda path: each_tensor(path, "pread"),
    "get_tensors": lambda: lambda path: all_tensors(path, "mmap"),
    "get_tensors, pread": lambda: lambda path: all_tensors(path, "pread"),
    "prefetch": lambda: prefetched,
    "prefetch of rows": lambda: lambda path: prefetched(path, plan={"rows": slice(3, 99), "half": None}, threads=2),
    "load_into": Into,
    "load_into, a module": lambda: IntoModel(weightload.load_into),
    "load_into, a class of its own": IntoOwn,
    "load_into, hooks after loading": Hooked,
    "load_model": lambda: IntoModel(weightload.load_model),
    "resolve": lambda: lambda path: weightload.resolve_safetensors_files(path),
    "node_group": lambda: lambda path: weightload.node_group(),
}


def facts(result: Any) -> Any:
    """Comparable."""
    if isinstance(result, dict):
        return {name: described(value) if isinstance(value, torch.Tensor) else value for name, value in result.items()}
    return result


def without_warnings(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


@pytest.fixture(scope="module")
def without(files: dict[str, Path]) -> Callable[..., Any]:
    """The outcome of a call without any mode."""
    known: dict[Any, Any] = {}

    def outcome(key: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = facts(without_warnings(call))
        return known[key]

    return outcome


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_in_every_mode(
    files: dict[str, Path], without: Callable[..., Any], call: str, mode: str, capsys: Any
) -> None:
    for which in ("small", "large", "odd"):
        plain = without((call, which), lambda: CALLS[call]()(files[which]))  # noqa: B023
        ready = CALLS[call]()
        within = MODES[mode](lambda: undisturbed(lambda: ready(files[which])))  # noqa: B023
        assert facts(within) == plain, which


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_every_index_in_every_mode(
    files: dict[str, Path], without: Callable[..., Any], backend: str, mode: str
) -> None:
    for which in ("small", "large"):
        pick = functools.partial(slices, files[which], backend)
        plain = without((backend, which), pick)
        within = MODES[mode](lambda: undisturbed(lambda: without_warnings(pick)))  # noqa: B023
        found = facts(within)
        assert [name for name, fact in found.items() if fact != plain[name]] == []


# Calls that fail: before anything is read, and on the way.
FAILURES: dict[str, Callable[[Path], Any]] = {
    "iterator": iterated,
    "iterator, pread": lambda path: iterated(path, backend="pread"),
    "load_file": weightload.load_file,
    "load_file, pread": lambda path: weightload.load_file(path, backend="pread"),
    "get_tensor": lambda path: weightload.safe_open(path).get_tensor("missing"),
    "get_slice": lambda path: weightload.safe_open(path, backend="pread").get_slice("large")[1:2300],
    "get_slice of a few": lambda path: weightload.safe_open(path, backend="pread").get_slice("rows")[1:9],
    "an index out of range": lambda path: weightload.safe_open(path).get_slice("matrix")[9],
    "prefetch": prefetched,
    "load_into": lambda path: weightload.load_into({"large": TOO_SMALL}, path, strict=False),
    "load_model": lambda path: weightload.load_model(LINEAR, path),
    "a device": lambda path: weightload.load_file(path, "cuda:77"),
    "a predicate": lambda path: iterated(path, names=refuse),
}
TOO_SMALL, LINEAR = torch.zeros(3), torch.nn.Linear(2, 2)


@pytest.mark.parametrize("mode", MODES)
def test_every_failure_in_every_mode(
    files: dict[str, Path], arm: Callable[..., None], without: Callable[..., Any], mode: str
) -> None:
    def failed(call: Callable[[Path], Any]) -> Any:
        arm("error", first=0, count=1 << 30, error_number=5)  # every read
        try:
            with pytest.raises(Exception) as caught:  # noqa: PT011
                call(files["large"])
        finally:
            _C.disarm_fault()
        return type(caught.value), str(caught.value)

    for name, call in FAILURES.items():
        alone = without(("failed", name), functools.partial(failed, call))
        assert MODES[mode](lambda: undisturbed(lambda: failed(call))) == alone  # noqa: B023


@pytest.mark.parametrize("mode", ["function mode that refuses", "inference mode", "device meta", "FakeTensorMode"])
def test_the_package_is_imported_in_a_mode(files: dict[str, Path], mode: str) -> None:
    script = f"""
    import sys
    sys.path.insert(0, {str(TESTS)!r})
    from support.torch_modes import MODES
    def use():
        import weightload
        with weightload.safe_open(sys.argv[1]) as file:
            return file.get_slice("rows")[[5, 2999]], weightload.load_file(sys.argv[1])["rows"]
    rows, whole = MODES[{mode!r}](use)
    assert rows.tolist() == whole[[5, 2999]].tolist()
    assert not rows.is_inference()
    """
    done = run_script(script, files["small"])
    assert done.returncode == 0, done.stderr
