"""safe_open: what safetensors' handle gives, and what ours promises beyond it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import BACKENDS, entry, evict, file_bytes, open_checkpoints, run_script, write_tensors
from safetensors import SafetensorError
from support.simulated import raw

import weightload
from weightload import load_file, safe_open
from weightload.errors import OptionError


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors that threads load, the second one misaligned in the file, and small ones between them."""
    tensors = [("a", "F32", [2200, 1000]), ("one", "U8", [1]), ("b", "BF16", [3000, 1501]), ("c", "I8", [9_000_001])]
    return write_tensors(tmp_path_factory.mktemp("large") / "large.safetensors", tensors)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, name: str = "") -> None:
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device), name
    assert torch.equal(raw(ours), raw(theirs)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("which", ["all_dtypes", "large"])
def test_every_tensor_is_what_safetensors_gives(
    request: pytest.FixtureRequest, which: str, backend: str, cold: bool
) -> None:
    path = request.getfixturevalue(which)
    with safetensors.safe_open(path, "pt") as theirs:
        reference = {name: theirs.get_tensor(name) for name in theirs.keys()}  # noqa: SIM118
    if cold:
        evict([path])
    with safe_open(path, backend=backend) as ours:
        got = {name: ours.get_tensor(name) for name in reversed(ours.keys())}
        together = ours.get_tensors()
    assert list(together) == ours_order(path)
    assert sorted(got) == sorted(together) == sorted(reference)
    for name, tensor in reference.items():
        for mine in (got[name], together[name]):
            assert mine.is_contiguous()
            assert_same(mine, tensor, name)


def ours_order(path: Path) -> list[str]:
    with safe_open(path) as file:
        return file.offset_keys()


def test_what_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"b": torch.arange(6).reshape(2, 3), "a": torch.ones(5, dtype=torch.bool)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "ä": "ö"})
    with safetensors.safe_open(path, "pt") as theirs, safe_open(path) as ours:
        assert ours.keys() == theirs.keys() == ["a", "b"]
        assert ours.offset_keys() == theirs.offset_keys() == ["b", "a"]
        assert ours.metadata() == theirs.metadata() == {"format": "pt", "ä": "ö"}
        assert list(ours) == ["a", "b"]
        assert len(ours) == 2
        assert "a" in ours
        assert "c" not in ours
        assert 3 not in ours
        assert "\ud800" not in ours
        assert {ours: 1}[ours] == 1
        assert ours.get_tensor_meta("b") == ("I64", [2, 3], (0, 48))
        assert ours.get_tensor_meta("a").data_offsets == (48, 53)
        assert ours.get_slice("b").get_shape() == theirs.get_slice("b").get_shape() == [2, 3]
        assert ours.get_slice("b").get_dtype() == theirs.get_slice("b").get_dtype() == "I64"
    plain = write_tensors(tmp_path / "plain.safetensors", [("t", "U8", [1])])
    with safetensors.safe_open(plain, "pt") as theirs, safe_open(plain) as ours:
        assert ours.metadata() is theirs.metadata() is None


def test_the_words_that_callers_match_on(all_dtypes: Path, tmp_path: Path) -> None:
    """Errors of safetensors and of weightload have the same words."""
    for call in (
        lambda opener: opener(tmp_path / "none", "pt"),
        lambda opener: opener(all_dtypes, "pt").get_tensor("none"),
        lambda opener: opener(all_dtypes, "pt").get_slice("none"),
        lambda opener: closed(opener(all_dtypes, "pt")).keys(),
        lambda opener: closed(opener(all_dtypes, "pt")).get_tensor("F32.vector"),
        lambda opener: opener(all_dtypes, "abacus"),
    ):
        errors = []
        for opener in (safetensors.safe_open, safe_open):
            with pytest.raises((OSError, safetensors.SafetensorError)) as caught:
                call(opener)  # type: ignore[no-untyped-call]
            errors.append(caught.value)
        theirs, ours = errors
        assert str(ours) == str(theirs)
        assert isinstance(ours, type(theirs))
        del errors, theirs, ours
    gc.collect()  # exceptions hold frames, and these handles
    with pytest.raises(FileNotFoundError) as missing:
        safe_open(tmp_path / "none")
    assert (missing.value.errno, missing.value.filename) == (2, str(tmp_path / "none"))


def closed(handle: safe_open) -> safe_open:
    with handle:
        pass
    return handle


@pytest.mark.parametrize("method", ["keys", "offset_keys", "metadata", "get_tensors", "prefetch", "__len__"])
def test_a_closed_handle(all_dtypes: Path, method: str) -> None:
    with pytest.raises(weightload.WeightLoadError, match=r"^File is closed$"):
        getattr(closed(safe_open(all_dtypes)), method)()


def test_a_handle_is_true(tmp_path: Path) -> None:
    """A handle is true even if it has no tensors or is closed: `if file:` asks whether there is a handle."""
    path = write_tensors(tmp_path / "none.safetensors", [])
    handle = safe_open(path)
    assert len(handle) == 0
    assert bool(handle) is bool(closed(handle)) is True


def test_a_subclass_may_have_a_signature_of_its_own(all_dtypes: Path) -> None:
    class Named(safe_open):
        def __init__(self, *, path: Path, framework: int) -> None:
            super().__init__(path)
            self.framework = framework

    with Named(path=all_dtypes, framework=3) as file:
        assert "F32.vector" in file


def test_many_slices_that_are_kept_take_no_mappings(large: Path) -> None:
    """A process may have 65,530 of them."""

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    with safe_open(large) as file:
        part, one = file.get_slice("a"), file.get_tensor("one").clone()
        part[0]
        before = mappings()
        kept = [part[i] for i in range(2000)]
        ones = [file.get_tensor("one") for _ in range(2000)]
        assert mappings() < before + 50
        assert all(torch.equal(raw(row), raw(whole)) for row, whole in zip(kept, file.get_tensor("a"), strict=False))
        assert all(torch.equal(each, one) for each in ones)


def test_a_file_truncated_after_its_handle_was_opened(large: Path, tmp_path: Path) -> None:
    """An index that makes a copy is read, not touched through the mapping: an error, and no SIGBUS."""
    path = Path(shutil.copy(large, tmp_path))
    done = run_script(
        """
        import os, sys, torch, weightload
        for backend in ("mmap", "pread"):
            with weightload.safe_open(sys.argv[1], backend=backend) as file:
                part = file.get_slice("c")
                os.truncate(sys.argv[1], 9_000_000)
                for index in ([0, 5_000_000, 9_000_000], torch.arange(9_000_001) % 2 == 0, (torch.tensor([3]),)):
                    try:
                        part[index]
                    except weightload.ReadError as error:
                        assert error.tensor == "c"
                    else:
                        raise AssertionError(index)
            os.truncate(sys.argv[1], os.stat(sys.argv[2]).st_size)
        """,
        path,
        large,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.parametrize("kind", [ValueError, SafetensorError, RuntimeError, OptionError])
def test_bad_arguments(all_dtypes: Path, kind: type[Exception]) -> None:
    """Whatever callers look for: what safetensors raises depends on whether it or torch refuses."""
    with pytest.raises(kind, match="backend 'telepathy'"):
        safe_open(all_dtypes, backend="telepathy")  # type: ignore[arg-type]
    for load in (lambda device: safe_open(all_dtypes, device=device), lambda device: load_file(all_dtypes, device)):
        for device in ("bad", 1.5, "cuda:x"):
            with pytest.raises(kind, match="device"):
                load(device)
        with pytest.raises(kind, match=r"cannot load to cuda|no accelerator"):
            load("cuda:0")
        with pytest.raises(kind, match="cannot load to meta"):
            load("meta")
    with safe_open(all_dtypes, "pt", torch.device("cpu")) as file:
        assert file.get_tensor("F32.vector").device == torch.device("cpu")


def test_other_frameworks_are_safetensors_own(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    safetensors.torch.save_file({"a": torch.arange(3)}, path)
    with safe_open(path, framework="np", backend="pread") as file:
        assert isinstance(file, safetensors.safe_open)
        assert file.get_tensor("a").tolist() == [0, 1, 2]


def test_without_with_the_file_is_closed_with_the_handle(all_dtypes: Path) -> None:
    handle = safe_open(all_dtypes)
    tensor = handle.get_tensor("F32.matrix")
    assert len(open_checkpoints()) == 1
    del handle
    gc.collect()
    assert open_checkpoints() == []
    assert tensor.shape == (3, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["a", "c", "one"])
def test_what_is_written_to_a_tensor_shows_nowhere_else(large: Path, backend: str, name: str) -> None:
    before = large.read_bytes()
    with safe_open(large, backend=backend) as file:
        part = file.get_slice(name)
        original = file.get_tensor(name).clone()
        for _ in range(2):
            file.get_tensor(name).view(torch.uint8).fill_(7)
            part[:].view(torch.uint8).fill_(8)
            part[0].view(torch.uint8).fill_(9)
            assert torch.equal(raw(file.get_tensor(name)), raw(original))
            assert torch.equal(raw(part[:]), raw(original))
        file.get_tensors()[name].view(torch.uint8).fill_(7)
        assert torch.equal(raw(file.get_tensors()[name]), raw(original))
    assert large.read_bytes() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_a_handle(mixed: list[Path], backend: str) -> None:
    path = mixed[0]
    reference = weightload.load_file(path)
    wrong: list[object] = []

    def look(file: safe_open, start: threading.Barrier, turn: int) -> None:
        start.wait()
        try:
            names = file.keys()
            for name in names[turn:] + names[:turn]:
                tensor = file.get_tensor(name)
                if not torch.equal(tensor, reference[name]) or not torch.equal(file.get_slice(name)[1:], tensor[1:]):
                    wrong.append(name)
        except BaseException as error:
            wrong.append(error)

    with safe_open(path, backend=backend) as file:
        start = threading.Barrier(8)
        threads = [threading.Thread(target=look, args=(file, start, turn * 11)) for turn in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_handle_in_a_forked_child(large: Path) -> None:
    done = run_script(
        """
        import os, sys, torch, weightload
        torch.set_num_threads(1)  # its threads would not be in the child
        file = weightload.safe_open(sys.argv[1])
        want = {name: file.get_tensor(name).clone() for name in file}
        child = os.fork()
        if not child:
            raw = lambda tensor: tensor.view(torch.uint8)
            same = all(torch.equal(raw(file.get_tensor(name)), raw(want[name])) for name in file)
            os._exit(0 if same and len(file.get_tensors()) == 4 else 1)
        assert os.waitpid(child, 0)[1] == 0
        """,
        large,
    )
    assert done.returncode == 0, done.stderr


def test_a_handle_in_a_child_forked_while_threads_use_it(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x.safetensors", [(f"{i}", "U8", [4 << 20]) for i in range(8)])
    done = run_script(
        """
        import os, signal, sys, threading, torch, weightload
        torch.set_num_threads(1)
        file = weightload.safe_open(sys.argv[1])
        want = file.get_tensor("1").clone()
        stop = threading.Event()

        def use():
            while not stop.is_set():
                for name in file.keys():
                    file.get_tensor(name)

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        ended = []
        for _ in range(60):
            child = os.fork()
            if not child:
                signal.alarm(30)
                os._exit(0 if torch.equal(file.get_tensor("1"), want) and file.get_slice("2")[1:3].numel() == 2 else 1)
            ended.append(os.waitpid(child, 0)[1])
            if ended[-1]:
                break
        stop.set()
        for thread in threads:
            thread.join()
        assert not any(ended), ended
        """,
        path,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_opening_reads_the_header_and_getting_a_tensor_its_bytes(tmp_path: Path, backend: str) -> None:
    """Nothing of the other gigabytes: here a sparse file of a hundred."""
    tensors = [(f"{i}", "U8", [10 << 30]) for i in range(10)]
    path = write_sparse(tmp_path / "sparse.safetensors", tensors)
    with safe_open(path, backend=backend) as file:
        assert len(file) == 10
        assert file.get_slice("7")[-5:].tolist() == [0] * 5
        assert file.get_slice("9")[[0, 10 << 29]].tolist() == [0, 0]
    used = int(subprocess.run(["du", "-k", path], capture_output=True, text=True, check=True).stdout.split()[0])
    assert used < 1000


def write_sparse(path: Path, tensors: list[tuple[str, str, list[int]]]) -> Path:
    """A file whose data is one hole."""
    header, offset = {}, 0
    for name, dtype, shape in tensors:
        header[name] = entry(dtype, shape, offset, offset + shape[0])
        offset += shape[0]
    path.write_bytes(file_bytes(header))
    os.truncate(path, path.stat().st_size + offset)
    return path
