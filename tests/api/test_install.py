"""install: what is replaced in a framework's modules, and that it is taken back."""

from __future__ import annotations

import errno
import importlib
import itertools
import linecache
import logging
import os
import pickle
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import evict, run_script, write_tensors

import weightload
from weightload._install import installing
from weightload._install.framework import Framework

NAME = "framework_that_reads"
MODULES = {
    "__init__": "",
    "before": """
        import safetensors
        import safetensors.torch
        from safetensors import safe_open
        from safetensors.torch import load_file as read_all, load_model
        other = read_all
        kept = {"in a dict": read_all}
        def by_attribute(path):
            return safetensors.torch.load_file(path)
    """,
    "later": "from safetensors import safe_open",
    "sub/__init__": "",
    "sub/later": """
        from safetensors.torch import load_file
        import safetensors.torch as st
    """,
}


@pytest.fixture
def framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of which one module is imported by now."""
    for name, text in MODULES.items():
        path = tmp_path / NAME / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installing, "FRAMEWORKS", (NAME,))
    monkeypatch.setattr(installing, "_said", set())
    sites = ((f"{NAME}.before", "safe_open"), (f"{NAME}.before", "read_all"))
    add_framework(monkeypatch, sites)
    yield importlib.import_module(f"{NAME}.before")
    weightload.uninstall()
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]


def add_framework(monkeypatch: pytest.MonkeyPatch, sites: tuple[tuple[str, str], ...]) -> None:
    known: Any = SimpleNamespace(FRAMEWORK=Framework(NAME, sites))
    monkeypatch.setitem(sys.modules, f"weightload.integrations.{NAME}", known)


def bindings() -> dict[tuple[str, str], object]:
    return {
        (module, name): value
        for module, found in list(sys.modules.items())
        if module.startswith(NAME)
        for name, value in vars(found).items()
        if name != "__builtins__"
    }


def is_ours(function: Any) -> bool:
    return function not in (safetensors.safe_open, safetensors.torch.load_file, safetensors.torch.load_model)


def test_names_bound_before_are_replaced(framework: Any) -> None:
    weightload.install(NAME)
    assert all(map(is_ours, [framework.safe_open, framework.read_all, framework.other, framework.load_model]))
    assert is_ours(framework.safetensors.torch.load_file)
    assert is_ours(framework.safetensors.safe_open)
    assert framework.safetensors.torch.save_file is safetensors.torch.save_file
    assert framework.safetensors.SafetensorError is safetensors.SafetensorError
    assert framework.kept["in a dict"] is safetensors.torch.load_file  # as no name of a module


def test_modules_that_are_imported_later_are_served_too(framework: Any) -> None:
    weightload.install(NAME)
    later, below = (importlib.import_module(f"{NAME}.{name}") for name in ("later", "sub.later"))
    assert is_ours(later.safe_open)
    assert is_ours(below.load_file)
    assert is_ours(below.st.load_file)
    for module in (later, below):
        loader = type(module.__spec__.loader).__name__
        assert loader == type(module.__loader__).__name__ == "SourceFileLoader"


def test_nobody_else_is_touched(framework: Any) -> None:
    before = dict(vars(safetensors)), dict(vars(safetensors.torch)), dict(vars(sys.modules[__name__]))
    weightload.install(NAME)
    assert before == (dict(vars(safetensors)), dict(vars(safetensors.torch)), dict(vars(sys.modules[__name__])))
    assert importlib.import_module("safetensors").safe_open is before[0]["safe_open"]


def test_it_is_taken_back_exactly(framework: Any) -> None:
    before, finders = bindings(), list(sys.meta_path)
    weightload.install(NAME)
    later = importlib.import_module(f"{NAME}.later")
    framework.somebody_elses = framework.other
    framework.other = len
    weightload.uninstall(NAME)
    assert framework.other is len
    assert framework.somebody_elses is later.safe_open.__class__ or not is_ours(framework.somebody_elses)
    framework.other = framework.read_all
    del framework.somebody_elses
    after = bindings()
    assert {key: after[key] for key in before} == before
    assert later.safe_open is safetensors.safe_open
    assert sys.meta_path == finders
    below = importlib.import_module(f"{NAME}.sub.later")
    assert below.load_file is safetensors.torch.load_file


def test_twice_is_once(framework: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "weightload"):
        weightload.install(NAME)
        first = bindings()
        weightload.install(NAME, NAME)
        assert bindings() == first
        weightload.uninstall()
        weightload.install(NAME)
        assert len(caplog.records) == 1
        said = caplog.records[0].getMessage()
        assert f"{NAME}.before.safe_open" in said
        assert f"{NAME}.before.safetensors" in said
    weightload.uninstall()
    assert framework.safe_open is safetensors.safe_open
    weightload.uninstall()


def test_blocks(framework: Any) -> None:
    with weightload.installed(NAME):
        assert is_ours(framework.safe_open)
        with weightload.installed(NAME):
            assert is_ours(framework.safe_open)
        assert is_ours(framework.safe_open)
    assert not is_ours(framework.safe_open)
    with pytest.raises(KeyError), weightload.installed(NAME):
        raise KeyError
    assert not is_ours(framework.safe_open)
    weightload.install(NAME)
    with weightload.installed(NAME):
        weightload.uninstall()
        assert is_ours(framework.safe_open)
    assert not is_ours(framework.safe_open)


def test_blocks_of_threads_overlap(framework: Any) -> None:
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with weightload.installed(NAME):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=inside)
    with weightload.installed(NAME):
        thread.start()
        assert entered.wait(60)
    assert is_ours(framework.safe_open)
    leave.set()
    thread.join()
    assert not is_ours(framework.safe_open)


@pytest.mark.parametrize("site", [("before", "gone"), ("gone", "safe_open"), ("before", "kept")])
def test_a_version_that_reads_elsewhere_is_refused(
    framework: Any, site: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bindings()
    add_framework(monkeypatch, ((f"{NAME}.before", "safe_open"), (f"{NAME}.{site[0]}", site[1])))
    with pytest.raises(RuntimeError, match=rf"cannot install weightload in {NAME} .*its {NAME}.{'.'.join(site)}"):
        weightload.install(NAME)
    assert bindings() == before


def test_one_that_is_refused_leaves_the_others(framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "FRAMEWORKS", (NAME, "not_there"))
    known: Any = SimpleNamespace(FRAMEWORK=Framework("not_there", ()))
    monkeypatch.setitem(sys.modules, "weightload.integrations.not_there", known)
    with pytest.raises(ModuleNotFoundError, match="no package 'not_there'"):
        weightload.install(NAME, "not_there")
    assert not is_ours(framework.safe_open)


@pytest.mark.parametrize("call", ["install", "uninstall", "leave"])
def test_an_interrupt_anywhere_leaves_nothing_for_good(framework: Any, call: str) -> None:
    """Before each line of it: what comes after, it is installed when it is, and taken back when it is."""
    before, finders = bindings(), list(sys.meta_path)
    for moment in itertools.chain(range(60), itertools.count(60, 211)):  # the loops over modules are long
        if call != "install":
            weightload.install(NAME)
        block = weightload.installed(NAME)
        if call == "leave":
            block.__enter__()
            weightload.uninstall()
        reached = interrupt_at_line(
            moment,
            {
                "install": lambda: weightload.install(NAME),
                "uninstall": lambda: weightload.uninstall(NAME),
                "leave": lambda block=block: block.__exit__(None, None, None),  # type: ignore[misc]
            }[call],
        )
        weightload.uninstall()
        assert bindings() == before, moment
        assert sys.meta_path == finders, moment
        weightload.install(NAME)
        assert is_ours(framework.safe_open), moment
        weightload.uninstall()
        assert bindings() == before
        if not reached:
            break
    assert moment > 20


def interrupt_at_line(number: int, call: Any) -> bool:
    """Raise KeyboardInterrupt before the line of this number of the modules that install; whether it came so far."""
    lines = itertools.count()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if "/_install/" not in frame.f_code.co_filename:
            return trace
        # No signal's handler runs between the end of a block and its `__exit__`, as this would.
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not text.startswith("with ") and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_module_that_another_thread_is_importing(framework: Any, tmp_path: Path) -> None:
    (tmp_path / NAME / "slow.py").write_text(
        "import sys, threading\nsys.begun.set()\nsys.go_on.wait(60)\nfrom safetensors import safe_open\n"
    )
    sys.begun, sys.go_on = threading.Event(), threading.Event()  # type: ignore[attr-defined]
    importing = threading.Thread(target=importlib.import_module, args=(f"{NAME}.slow",))
    importing.start()
    assert sys.begun.wait(60)  # type: ignore[attr-defined]
    threading.Timer(0.05, sys.go_on.set).start()  # type: ignore[attr-defined]
    weightload.install(NAME)
    importing.join()
    assert is_ours(sys.modules[f"{NAME}.slow"].safe_open)


def test_a_child_of_a_fork_while_another_thread_imports(framework: Any, tmp_path: Path) -> None:
    (tmp_path / NAME / "slow.py").write_text("import sys\nsys.begun.set()\nsys.go_on.wait(60)\n")
    sys.begun, sys.go_on = threading.Event(), threading.Event()  # type: ignore[attr-defined]
    importing = threading.Thread(target=importlib.import_module, args=(f"{NAME}.slow",))
    importing.start()
    assert sys.begun.wait(60)  # type: ignore[attr-defined]
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        weightload.install(NAME)
        os._exit(0 if is_ours(framework.safe_open) else 1)
    sys.go_on.set()  # type: ignore[attr-defined]
    importing.join()
    assert os.waitpid(pid, 0)[1] == 0


def test_others_finders_may_ask_all(framework: Any) -> None:
    class Asking:
        @staticmethod
        def find_spec(name: str, path: Any, target: Any = None) -> Any:
            others = [finder for finder in sys.meta_path if finder is not Asking]
            return next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)

    weightload.install(NAME)
    sys.meta_path.insert(0, Asking)  # type: ignore[arg-type]
    try:
        assert is_ours(importlib.import_module(f"{NAME}.later").safe_open)
    finally:
        sys.meta_path.remove(Asking)  # type: ignore[arg-type]


def test_a_child_of_a_fork_may_install(framework: Any) -> None:
    """While a thread of its parent is importing frameworks."""
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with installing._lock:
            held.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        weightload.install(NAME)
        os._exit(0 if is_ours(framework.safe_open) else 1)
    leave.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0


def test_stand_ins_can_be_pickled(framework: Any) -> None:
    weightload.install(NAME)
    for name in ("safe_open", "read_all", "load_model"):
        assert pickle.loads(pickle.dumps(getattr(framework, name))) is getattr(framework, name)


def test_unknown_names() -> None:
    for call in (weightload.install, weightload.uninstall):
        with pytest.raises(ValueError, match="no such framework: 'tensorflow'; must be one of 'transformers'"):
            call("tensorflow")
        with pytest.raises(TypeError, match=r"must be names \(str\), not list"):
            call(["transformers"])
    for call in (weightload.install, lambda: weightload.installed().__enter__()):
        with pytest.raises(ValueError, match="no framework is named; they are 'transformers'"):
            call()


def test_importing_weightload_does_nothing() -> None:
    script = """
        import sys
        finders = list(sys.meta_path)
        import weightload
        assert not any(name.startswith("weightload.integrations") for name in sys.modules)
        assert not [f for f in sys.meta_path if type(f).__module__.startswith("weightload")]
    """
    done = run_script(script)
    assert done.returncode == 0, done.stderr


# Stand-ins


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tensors(tmp_path / "a.safetensors", [(f"{i}", "F32", [3, 5]) for i in range(4)])


def same(ours: Any, theirs: Any) -> None:
    """Two calls that return the same, or raise the same."""
    found, expected = outcome(ours), outcome(theirs)
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def outcome(call: Any) -> Any:
    """Make the call; return its result, or its exception in words."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        (("cpu",), {}),
        ((torch.device("cpu"),), {}),
        ((0,), {}),
        (("meta",), {}),
        (("cuda:0",), {}),
        (("no such",), {}),
        ((None,), {}),
        ((), {"backend": "pread"}),
        ((), {"backend": "auto"}),
        ((), {"other": 1}),
    ],
)
def test_what_is_not_served_is_safetensors_own_business(
    framework: Any, file: Path, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with weightload.installed(NAME):
        if arguments != (torch.device("cpu"),):  # which is served, and safetensors refuses
            same(
                lambda: framework.read_all(str(file), *arguments, **options),
                lambda: safetensors.torch.load_file(str(file), *arguments, **options),
            )

            def handle(opened: Any) -> dict[str, torch.Tensor]:
                with opened as f:
                    return {name: f.get_slice(name)[...] for name in f.keys()}  # noqa: SIM118

            same(
                lambda: handle(framework.safe_open(str(file), "pt", *arguments, **options)),
                lambda: handle(safetensors.safe_open(str(file), "pt", *arguments, **options)),
            )
        else:
            assert len(framework.read_all(str(file), *arguments)) == 4


def test_other_frameworks(framework: Any, file: Path) -> None:
    with weightload.installed(NAME):
        assert type(framework.safe_open(str(file), "np")).__module__ == "builtins"
        assert type(framework.safe_open(str(file), framework="numpy").get_tensor("0")).__name__ == "ndarray"
        same(lambda: framework.safe_open(str(file)), lambda: safetensors.safe_open(str(file)))
        with framework.safe_open(str(file), framework="pt") as ours:
            assert isinstance(ours, framework.safe_open)
            assert isinstance(ours, weightload.safe_open)


def test_load_model(framework: Any, file: Path, tmp_path: Path) -> None:
    models = [torch.nn.Linear(3, 2) for _ in range(3)]
    safetensors.torch.save_model(models[0], str(tmp_path / "m.safetensors"))
    with weightload.installed(NAME):
        assert framework.load_model(models[1], tmp_path / "m.safetensors") == (set(), [])
    safetensors.torch.load_model(models[2], str(tmp_path / "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(models[1].parameters(), models[2].parameters(), strict=True))


# Bytes that come ahead


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    return write_tensors(folder / "large.safetensors", [(f"{i:02}", "I16", [512, 1024]) for i in range(24)])


def open_slices(framework: Any, path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A handle, and slices of all tensors, all of which will be wanted."""
    handle = framework.safe_open(str(path), framework="pt", **options)
    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    for each in slices.values():
        each.will_be_wanted()
    return handle, slices


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("order", ["forward", "backward", "threads"])
@pytest.mark.parametrize("cold", [True, False])
def test_slices(framework: Any, large: Path, backend: str, order: str, cold: bool) -> None:
    expected = safetensors.torch.load_file(str(large))
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    with weightload.installed(NAME):
        if cold:
            evict([large])
        _, slices = open_slices(framework, large, backend=backend)
        found: dict[str, torch.Tensor] = {}
        names = list(slices) if order == "forward" else list(slices)[::-1]

        def take(some: list[str]) -> None:
            for name in some:
                found[name] = slices[name][...]

        if order == "threads":
            threads = [threading.Thread(target=take, args=(names[k::3],)) for k in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            take(names)
        again = {name: slices[name][:] for name in names}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor)
            assert torch.equal(again[name], tensor)
            assert torch.equal(slices[name][3:5, 1:], tensor[3:5, 1:])
        found["03"].zero_()
        assert torch.equal(slices["03"][...], expected["03"])
        assert torch.equal(found["04"], expected["04"])


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record each reading ahead as a list of names."""
    from weightload._install import read_ahead

    begun: list[list[str]] = []
    start = read_ahead.start_prefetch

    def watched(reader: Any, plan: Any, *arguments: Any, **options: Any) -> Any:
        begun.append(list(plan))
        return start(reader, plan, *arguments, **options)

    monkeypatch.setattr(read_ahead, "start_prefetch", watched)
    return begun


@pytest.mark.parametrize("cold", [True, False])
def test_what_will_be_wanted_comes_ahead(framework: Any, large: Path, begun: list[list[str]], cold: bool) -> None:
    with weightload.installed(NAME):
        evict([large])
        if not cold:
            large.read_bytes()
        handle = framework.safe_open(str(large), framework="pt")
        slices = [handle.get_slice(f"{i:02}") for i in range(12)]
        for each in slices[:6]:
            each.will_be_wanted()
        assert slices[0][0:1].shape == (1, 1024)
        assert slices[9][...].shape == (512, 1024)
        assert begun == []  # a part, and one that nobody has announced
        assert slices[2][...].shape == (512, 1024)
        assert begun == [[f"{i:02}" for i in range(6)]]
        for each in slices[6:]:
            each.will_be_wanted()
        assert slices[3][...].shape == (512, 1024)
        assert len(begun) == 1
        assert slices[11][...].shape == (512, 1024)
        assert begun[1] == [f"{i:02}" for i in range(6, 12)]
        handle.__exit__(None, None, None)
        assert all(torch.equal(s[...], s[:]) for s in slices)
        assert len(begun) == 2


def test_nothing_is_read_that_nobody_wants(framework: Any, large: Path, begun: list[list[str]]) -> None:
    with weightload.installed(NAME):
        evict([large])
        with framework.safe_open(str(large), framework="pt") as handle:
            slices = [handle.get_slice(f"{i:02}") for i in range(24)]
            before = read_from_storage()
            slices[23][...].sum()
            assert read_from_storage() - before < 6 << 20  # what the system reads ahead is not ours
            assert begun == []


def read_from_storage() -> int:
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def test_a_signal_handler_may_take_one(framework: Any, large: Path) -> None:
    """In the moment in which its thread begins to read ahead, too."""
    from weightload._install import read_ahead

    start = read_ahead.start_prefetch
    slices: dict[str, Any] = {}
    taken: list[torch.Tensor] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if not taken:
            taken.append(torch.empty(0))
            signal.raise_signal(signal.SIGUSR1)
        return start(*arguments, **options)

    before = signal.signal(signal.SIGUSR1, lambda *_: taken.append(slices["05"][...]))
    try:
        with weightload.installed(NAME), pytest.MonkeyPatch.context() as patch:
            patch.setattr(read_ahead, "start_prefetch", interrupted)
            evict([large])
            handle, found = open_slices(framework, large)
            slices.update(found)
            with handle:
                assert torch.equal(slices["00"][...], slices["00"][:])
                assert torch.equal(taken[1], slices["05"][:])
    finally:
        signal.signal(signal.SIGUSR1, before)
        slices.clear()


def test_whoever_stops_stops_the_reading(framework: Any, large: Path) -> None:
    from conftest import open_checkpoints, thread_count

    threads = thread_count()
    with weightload.installed(NAME):
        for leave in ("exit", "forget"):
            evict([large])
            handle, slices = open_slices(framework, large)
            kept = slices["00"][...]
            if leave == "exit":
                handle.__exit__(None, None, None)
                assert thread_count() == threads
            del handle, slices
            assert thread_count() == threads
            assert open_checkpoints() == []
            assert kept.float().isfinite().any()
            del kept


def test_a_file_that_cannot_be_read(framework: Any, large: Path, arm: Callable[..., None]) -> None:
    with weightload.installed(NAME):
        evict([large])
        _, slices = open_slices(framework, large, backend="pread")
        arm("error", first=4, count=10**6, error_number=errno.EIO)
        with pytest.raises(weightload.ReadError) as caught:
            for each in slices.values():
                each[...]
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(large))
        del slices, each, caught  # whose traceback has this frame in it
