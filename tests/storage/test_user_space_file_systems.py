"""Storage that fails, answers short, or goes past the page cache: a file system in user space, by every public call.

Each call runs in a process of its own, as a byte that is touched and cannot be read ends it (SIGBUS).
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, run_script, write_tensors
from support import fuse_server

pytestmark = pytest.mark.skipif(fuse_server.why_not() is not None, reason=str(fuse_server.why_not()))

MIB = 1 << 20
BAD = {"large.safetensors": "bad", "small.safetensors": "worse"}
LARGE = [("first", "U8", [3 * MIB]), ("bad", "U16", [MIB, 1]), ("large", "U8", [9, MIB]), ("last", "U8", [MIB])]
SMALL = [("worse" if number == 70 else f"{number}", "U8", [5, 4096]) for number in range(150)]

# Every public call, as a function of a list of files that returns the bytes of each tensor it has read.
SCRIPT = """
    import json, os, sys
    sys.path.insert(0, os.environ["TESTS"])
    import safetensors.torch, torch, weightload
    from weightload import errors
    from support.ways import CPU_WAYS, bytes_of, content, halves, raw_bytes
    from support import fuse_server
    from pathlib import Path

    def ones_like(path):
        whole = safetensors.torch.load_file(Path(os.environ["FOLDER"]) / Path(path).name)
        return {name: torch.ones_like(tensor) for name, tensor in whole.items()}

    def one_by_one(paths, backend):
        result = {}
        for path in paths:
            handle = weightload.safe_open(path, backend=backend)
            for name in reversed(handle.offset_keys()):
                try:
                    result[name] = raw_bytes(handle.get_tensor(name))
                except errors.ReadError:
                    if name not in ("bad", "worse"): raise
                    failed = sys.exc_info()[1]
        if "bad" not in result and "worse" not in result: raise failed
        return result

    def again(paths):
        result = {}
        for path in paths:
            handle = weightload.safe_open(path)
            for name in handle.offset_keys():
                result[name] = [handle.get_tensor(name) for _ in range(2)][1]
        return bytes_of(result)

    def strided(paths):
        result = {}
        for path in paths:
            handle = weightload.safe_open(path)
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                even, odd = part[::2], part[1::2]
                whole = torch.empty(part.get_shape(), dtype=even.dtype)
                whole[::2], whole[1::2] = even, odd
                result[name] = raw_bytes(whole)
        return result

    class Model(torch.nn.Module):
        def __init__(self, tensors):
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

    def model(paths):
        result = {}
        for path in paths:
            made = Model(ones_like(path))
            weightload.load_model(made, path)
            result |= bytes_of(made.state_dict())
        return result

    def into(paths, cast=False):
        result = {}
        for path in paths:
            own = ones_like(path)
            target = {name: tensor.to(torch.float64) if cast else tensor for name, tensor in own.items()}
            weightload.load_into(target, path)
            result |= bytes_of({name: tensor.to(own[name].dtype) for name, tensor in target.items()})
        return result

    ways = {
        **{name: way for name, way in CPU_WAYS.items() if not name.startswith("load_into")},
        "slices-mmap": lambda paths: halves(paths, backend="mmap"),
        "strided-mmap": strided,
        "single-mmap": lambda paths: one_by_one(paths, "mmap"),
        "single-pread": lambda paths: one_by_one(paths, "pread"),
        "again-mmap": again,
        "load_model": model,
        "load_into": into,
        "load_into, cast": lambda paths: into(paths, cast=True),
    }
    if sys.argv[1] == "resolve":
        def resolve(paths):
            assert weightload.resolve_safetensors_files(paths) == [str(path) for path in paths]
            return want
        ways = {"resolve": resolve}
    folder, mount = Path(os.environ["FOLDER"]), Path(sys.argv[2])
    paths = [mount / name for name in sys.argv[3:]]
    want = content(*[folder / path.name for path in paths])
    size = sum((folder / path.name).stat().st_size for path in paths)
    outcomes = {}
    for name, way in ways.items():
        reader, writer = os.pipe()
        before = fuse_server.served(mount)
        child = os.fork()
        if child == 0:
            try:
                got = way(paths)
                said = "right" if got == want else "wrong"
            except errors.ReadError as error:
                said = [error.errno, error.offset, error.tensor, error.filename]
            except BaseException as error:
                said = repr(error)
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as pipe: said = pipe.read()
        status = os.waitpid(child, 0)[1]
        served = (fuse_server.served(mount) - before) / size
        outcomes[name] = [json.loads(said) if said else f"status {status}", served]
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_tensors(folder / "large.safetensors", LARGE, pad_to=4096 - 8)
    write_tensors(folder / "small.safetensors", SMALL, pad_to=4096 - 8)
    return folder


def outcomes(folder: Path, mount: Path, *names: str, which: str = "all") -> dict[str, Any]:
    environment = {**os.environ, "TESTS": str(TESTS), "FOLDER": str(folder)}
    done = run_script(SCRIPT, which, mount, *names, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def place_of(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[BAD[path.name]]["data_offsets"]
    return 8 + length + begin, 8 + length + end


def bad_pages(path: Path) -> tuple[int, int]:
    """Two pages in the middle of the tensor, and of no other."""
    begin, end = place_of(path)
    middle = (begin + end) // 2 // 4096 * 4096
    return middle, middle + 8192


@pytest.mark.parametrize(
    ("name", "direct_io"), [("large.safetensors", False), ("large.safetensors", True), ("small.safetensors", False)]
)
def test_a_bad_sector_is_an_exception_at_its_tensor(folder: Path, tmp_path: Path, name: str, direct_io: bool) -> None:
    first, last = bad_pages(folder / name)
    begin, end = place_of(folder / name)
    faults = {"error_from": first, "error_to": last, "direct_io": direct_io}
    with fuse_server.mounted(folder, tmp_path / "mount", **faults) as mount:
        found = outcomes(folder, mount, name)
        for way, (said, _) in found.items():
            assert isinstance(said, list), (way, said)
            errno, offset, tensor, filename = said
            assert (errno, tensor, filename) == (5, BAD[name], str(mount / name)), (way, said)
            assert begin <= offset < end, (way, said)
    assert len(found) > 15


def test_a_bad_sector_in_a_header(folder: Path, tmp_path: Path) -> None:
    with fuse_server.mounted(folder, tmp_path / "mount", error_from=0, error_to=4096) as mount:
        found = outcomes(folder, mount, "small.safetensors")
        found |= outcomes(folder, mount, "small.safetensors", "large.safetensors", which="resolve")
        for way, (said, _) in found.items():
            assert isinstance(said, list), (way, said)
            assert said[0] == 5, (way, said)


@pytest.fixture(params=[{"direct_io": True}, {"direct_io": True, "short": True}, {}], ids=["direct", "short", "cached"])
def odd(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[Path]:
    with fuse_server.mounted(folder, tmp_path / "mount", threads=4, **request.param) as mount:
        yield mount


def test_every_byte_is_asked_for_once(odd: Path, folder: Path) -> None:
    for way, (said, served) in outcomes(folder, odd, "large.safetensors", "small.safetensors").items():
        assert said == "right", (way, said)
        # Where nothing is cached, what is asked for twice is read twice, and so are rows that lie close to others.
        most = 2.1 if way in ("again-mmap", "strided-mmap") else 1.1
        assert served <= most, (way, served)


def test_resolving_several_files(odd: Path, folder: Path) -> None:
    names = ["large.safetensors", "small.safetensors"]
    assert outcomes(folder, odd, *names, which="resolve")["resolve"][0] == "right"


SMALL_ONES = """
import sys, weightload
found = {}
with weightload.safe_open(sys.argv[1]) as file:
    names = file.offset_keys()
    for name in names if sys.argv[2] == "forwards" else reversed(names):
        try:
            file.get_tensor(name).sum()
        except weightload.ReadError as error:
            found[name] = error.errno
print(found)
"""


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_a_bad_page_that_small_tensors_share_with_good_ones(tmp_path: Path, order: str) -> None:
    """No tensor of less than a page may be taken for cached because one of its two pages is."""
    tensors = [(f"t{i:03d}", "F32", [1000]) for i in range(60)]
    (tmp_path / "files").mkdir()
    path = write_tensors(tmp_path / "files" / "m.safetensors", tensors)
    first = path.stat().st_size // 2 // 4096 * 4096
    with fuse_server.mounted(path.parent, tmp_path / "mount", error_from=first, error_to=first + 1) as mount:
        done = run_script(SMALL_ONES, mount / path.name, order)
    assert done.returncode == 0, done.stderr
    found = ast.literal_eval(done.stdout)
    begin = path.stat().st_size - 60 * 4000
    touched = {
        name
        for i, (name, _, _) in enumerate(tensors)
        if begin + i * 4000 < first + 4096 and first < begin + (i + 1) * 4000
    }
    assert set(found) == touched
    assert set(found.values()) == {5}
