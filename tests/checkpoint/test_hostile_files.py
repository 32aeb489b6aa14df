"""Files that are no safetensors files, cannot be opened, or claim too much: an error, by every way in."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path

import pytest
from conftest import entry, file_bytes, run_script, write_tensors
from support.headers import VIOLATIONS
from support.ways import WAYS, Way, assert_nothing_held, descriptor_count, way_of

import weightload
from weightload import errors
from weightload._checkpoint.selection import open_files
from weightload.cli import main as cli

U8 = entry("U8", [1], 0, 1)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return way_of(request)


def test_every_rule_by_every_way(way: Way, tmp_path: Path) -> None:
    for number, (rule, content) in enumerate(VIOLATIONS):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(getattr(errors, rule)) as caught:
            way([path])
        assert caught.value.filename == str(path)
        del caught
    assert_nothing_held()


def test_every_rule_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (_, content) in enumerate(VIOLATIONS):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        for command in ("inspect", "verify"):
            assert cli.main([command, str(path)]) == 1
            output = capsys.readouterr()
            assert str(path) in output.out + output.err


def special_files(folder: Path) -> list[Path]:
    """Make a file of every kind that is not regular."""
    fifo, listener, loop = folder / "fifo.safetensors", folder / "socket.safetensors", folder / "link.safetensors"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(listener))
    loop.symlink_to(fifo)
    found = [fifo, listener, loop, folder, Path("/dev/null"), Path("/dev/zero"), Path("/dev/tty")]
    if os.geteuid() == 0:
        disk = folder / "disk.safetensors"
        os.mknod(disk, 0o600 | stat.S_IFBLK, os.makedev(240, 255))  # a number that no driver has
        found.append(disk)
    return found


def test_only_regular_files_by_every_way(way: Way, tmp_path: Path) -> None:
    for path in special_files(tmp_path):
        with pytest.raises(errors.NotARegularFile) as caught:
            way([path])
        assert caught.value.filename == str(path)
        del caught
    assert_nothing_held()


def test_only_regular_files_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in special_files(tmp_path):
        if not path.is_dir():
            assert cli.main(["verify", str(path)]) == 1
            assert "not a regular file" in capsys.readouterr().out


def test_special_files_in_a_directory(tmp_path: Path) -> None:
    """Beside a good shard: the headers of several are read, so it is found at once."""
    write_tensors(tmp_path / "a.safetensors", [("a", "U8", [1])])
    os.mkfifo(tmp_path / "b.safetensors")
    with pytest.raises(errors.NotARegularFile, match=r"b\.safetensors"):
        weightload.resolve_safetensors_files(tmp_path)


def test_a_link_loop_by_every_way(way: Way, tmp_path: Path) -> None:
    loop, other = tmp_path / "loop.safetensors", tmp_path / "other.safetensors"
    loop.symlink_to(other)
    other.symlink_to(loop)
    for call in (way, lambda paths: weightload.resolve_safetensors_files(paths[0])):
        with pytest.raises(OSError, match="symbolic links") as caught:
            call([loop])
        assert (caught.value.errno, caught.value.filename) == (40, str(loop))
        del caught
    assert cli.main(["verify", str(loop)]) == 3


def test_a_zero_in_a_path_is_refused(way: Way, tmp_path: Path) -> None:
    """The system would take it for the path's end, and open another file."""
    path = write_tensors(tmp_path / "a.safetensors", [("a", "U8", [1])])
    with pytest.raises(ValueError, match="null byte"):
        way([Path(f"{path}\0.txt")])


def test_unreadable_files_keep_their_errno(tmp_path: Path) -> None:
    """Unreadable files raise errors with their errno. A test run by root becomes a user without privileges."""
    write_tensors(tmp_path / "a.safetensors", [("a", "U8", [1])]).chmod(0)
    write_tensors(tmp_path / "b.safetensors", [("b", "U8", [1])])
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "b.safetensors"}}')
    (tmp_path / "model.safetensors.index.json").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    tmp_path.chmod(0o755)
    script = """
        import os, sys, torch, weightload
        from weightload.cli import main as cli
        dict(weightload.safetensors_weights_iterator(["b.safetensors"], to_cpu=True))  # imports what is left
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        ways = [
            lambda path: weightload.safetensors_weights_iterator(["b.safetensors", path], to_cpu=True),
            lambda path: weightload.load_file(path),
            lambda path: weightload.load_into({"a": torch.zeros(1)}, path),
        ]
        unreadable = [(way, "a.safetensors") for way in ways]
        unreadable += [(weightload.resolve_safetensors_files, path) for path in
            (".", "closed", "model.safetensors.index.json", "closed/a.safetensors", ["closed/a", "b"])]
        for way, path in unreadable:
            try:
                way(path)
            except PermissionError as error:
                assert error.errno == 13 and error.filename, (path, error)
            else:
                raise AssertionError(path)
        assert cli.main(["verify", "a.safetensors"]) == 3
        assert cli.main(["inspect", "."]) == 3
    """
    done = run_script(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_files_of_the_kernel_that_are_shorter_than_they_say(way: Way) -> None:
    for path in (Path("/proc/self/status"), Path("/sys/kernel/mm/transparent_hugepage/enabled")):
        if path.exists():
            with pytest.raises(errors.WeightLoadError, match=str(path)):
                way([path])


@pytest.mark.parametrize("name", [b"\xff.safetensors", b"a\nb\x1b[31m.safetensors"])
def test_strange_names(way: Way, name: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file loads even if its name is not UTF-8, or steers a terminal. The name is shown harmless."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    write_tensors(path, [("a", "U8", [1])])
    assert list(way([path])) == ["a"]
    assert weightload.resolve_safetensors_files(tmp_path) == [str(path)]
    for command in (["inspect"], ["inspect", "--tensors"], ["inspect", "--json"], ["verify"]):
        assert cli.main([*command, str(path)]) == 0
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    output.out.encode("utf-8")
    path.write_bytes(b"1234567")
    with pytest.raises(errors.HeaderTooSmall) as caught:
        way([path])
    assert caught.value.filename == str(path)
    assert "\n" not in str(caught.value)
    assert cli.main(["verify", str(path)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_names_of_tensors_that_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({"__metadata__": {"k": "x\nok   all is well"}, "\x1b[2J\0\r": U8}, b"1"))
    assert cli.main(["inspect", "--tensors", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    path.write_bytes(file_bytes({"\x1b[2J\0\r": entry("U8", [2], 0, 1)}, b"1"))
    with pytest.raises(errors.TensorInvalidInfo, match="invalid shape") as caught:  # what is behind the zero, too
        weightload.load_file(path)
    assert str(caught.value).isprintable()
    assert caught.value.tensor == "\x1b[2J\0\r"


def test_output_that_the_terminals_encoding_lacks(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({"ü😀": U8}, b"1"))
    script = "import sys; from weightload.cli.main import main; sys.exit(main(['inspect', '--tensors', sys.argv[1]]))"
    done = run_script(script, path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "\\xfc\\U0001f600" in done.stdout


# The others load a file at a time.
WHOLE_CHECKPOINTS = [way for way in WAYS if re.search("iterator|load_into", str(way))]


@pytest.mark.parametrize("way", WHOLE_CHECKPOINTS, indirect=True)
def test_a_tensor_in_two_files_by_every_way(way: Way, tmp_path: Path) -> None:
    files = [write_tensors(tmp_path / f"{i}.safetensors", [("a", "U8", [1]), (str(i), "U8", [1])]) for i in range(2)]
    with pytest.raises(errors.DuplicateTensor) as caught:
        way(files)
    assert (caught.value.filename, caught.value.tensor) == (str(files[1]), "a")
    del caught
    assert_nothing_held()


@pytest.mark.parametrize(
    "shape",
    [[2**63, 0], [2**64 - 1, 0], [0, 2**62, 2], [1] * 200_000, [0] * 200_000],
    ids=["2**63", "2**64-1", "product", "ones", "zeros"],
)
def test_shapes_beyond_what_torch_holds(shape: list[int], tmp_path: Path) -> None:
    """Valid by the format. Loaded, or an error that names the tensor."""
    path = tmp_path / "a.safetensors"
    size = 0 if 0 in shape else 1
    path.write_bytes(file_bytes({"a": entry("U8", shape, 0, size)}, b"1"[:size]))
    for call in (lambda: weightload.load_file(path), lambda: weightload.load(path.read_bytes())):
        try:
            assert list(call()["a"].shape) == shape
        except errors.TensorError as error:
            assert error.tensor == "a"  # noqa: PT017


def test_load_takes_bytes_only(tmp_path: Path) -> None:
    data = write_tensors(tmp_path / "a.safetensors", [("a", "U8", [1])]).read_bytes()
    for given in (data, bytearray(data), memoryview(data)):
        assert list(weightload.load(given)) == ["a"]
    for given in (10**15, "text", [1, 2], None):  # a number would be that many zeros
        with pytest.raises(TypeError):
            weightload.load(given)  # type: ignore[arg-type]


def test_many_failures_leave_nothing(way: Way, tmp_path: Path) -> None:
    bad = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, (_, content) in zip(bad, VIOLATIONS[:3], strict=True):
        path.write_bytes(content)
    good = write_tensors(tmp_path / "good.safetensors", [("a", "U8", [1])])
    way([good])
    before = descriptor_count()
    for path in [*bad, tmp_path, tmp_path / "none"] * 20:
        with pytest.raises((errors.WeightLoadError, FileNotFoundError)):
            way([good, path])
    assert_nothing_held()
    assert descriptor_count() == before
    assert len(open_files([good])) == 1
