"""Index files and directories made to harm: endless, huge, misleading, or with names that nothing can handle."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from conftest import run_script, write_tensors

import weightload
from weightload import errors
from weightload._checkpoint.index import MAX_INDEX_BYTES
from weightload._checkpoint.resolve import natural_key
from weightload.cli import main as cli

INDEX = "model.safetensors.index.json"


def refused(folder: Path, words: str) -> None:
    """By the directory and by the index itself, as a library and on the command line."""
    for path in (folder, folder / INDEX):
        if path.is_dir() and path != folder:
            continue  # taken for a model's directory
        with pytest.raises(errors.CheckpointError, match=words) as caught:
            weightload.resolve_safetensors_files(path)
        assert caught.value.filename == str(folder / INDEX)
        assert len(str(caught.value)) < 1000
        assert cli.main(["inspect", str(path)]) == 1


def write_index(folder: Path, *names: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "/dev/zero", "/dev/tty"])
def test_an_index_that_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    """Neither waits for a writer nor reads for ever."""
    path = tmp_path / INDEX
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(kind)
    refused(tmp_path, "not a regular file")


def test_a_link_loop(tmp_path: Path) -> None:
    (tmp_path / INDEX).symlink_to(INDEX)
    with pytest.raises(OSError, match="symbolic links") as caught:
        weightload.resolve_safetensors_files(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (40, str(tmp_path / INDEX))


def test_a_shard_that_is_a_link_loop(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(OSError, match="symbolic links") as caught:
        weightload.resolve_safetensors_files(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (40, str(tmp_path / "a.safetensors"))


def test_a_sparse_giant(tmp_path: Path) -> None:
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 2**42)
    refused(tmp_path, f"too large for an index: {2**42} bytes, more than {MAX_INDEX_BYTES}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "an HTML or XML page"),
        (b"\xef\xbb\xbf\n <Error><Code>AccessDenied</Code></Error>", "an HTML or XML page"),
    ],
)
def test_what_failed_downloads_leave(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path, words)


def test_memory_is_bounded_by_the_size_of_an_index(tmp_path: Path) -> None:
    """Zeros, which may be taken for UTF-32."""
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, MAX_INDEX_BYTES // 4)
    script = """
        import resource, sys, weightload
        used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), resource.RLIM_INFINITY))
        try:
            weightload.resolve_safetensors_files(sys.argv[1])
        except weightload.WeightLoadError as error:
            assert "not JSON" in str(error)
            sys.exit(7)
    """
    assert run_script(script, tmp_path).returncode == 7


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_encodings_that_json_may_have(tmp_path: Path, encoding: str) -> None:
    write_tensors(tmp_path / "ü.safetensors", [("ä", "U8", [1])])
    text = json.dumps({"weight_map": {"ä": "ü.safetensors"}}, ensure_ascii=False)
    (tmp_path / INDEX).write_bytes(text.encode(encoding))
    assert weightload.resolve_safetensors_files(tmp_path) == [str(tmp_path / "ü.safetensors")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("\ud800.safetensors", "half a character"),
        ("\ud800/a.safetensors", "half a character"),
        ("a/" * 2_000_000 + "a.safetensors", "a path of 4000013 bytes"),
        ("a" * 5000 + ".safetensors", "a path of 5012 bytes"),
        ("\0.safetensors", "outside its directory"),
        (".", "outside its directory"),
        ("./..//../x.safetensors", "outside its directory"),
        ("x.safetensors/", "outside its directory"),
        ("\x1b[2J", "not a safetensors file"),
    ],
    ids=range(9),
)
def test_names_of_shards_that_cannot_be(tmp_path: Path, name: str, words: str) -> None:
    if name.endswith("/"):
        (tmp_path / "x.safetensors").symlink_to(tmp_path.parent)
        name += "y.safetensors"
    write_index(tmp_path, name)
    refused(tmp_path, words)


def test_a_name_longer_than_file_systems_have(tmp_path: Path) -> None:
    write_index(tmp_path, "a" * 300 + ".safetensors")
    with pytest.raises(OSError, match="too long") as caught:
        weightload.resolve_safetensors_files(tmp_path)
    assert caught.value.errno == 36


def test_numbers_of_thousands_of_digits(tmp_path: Path) -> None:
    """Which int() refuses."""
    write_index(tmp_path, "1" * 5000 + ".safetensors", "2" * 5000 + ".safetensors")
    refused(tmp_path, "a path of 5012 bytes")
    (tmp_path / INDEX).write_text('{"weight_map": ' + "1" * 10_000 + "}")
    refused(tmp_path, "is not JSON")


def test_digits_that_are_none() -> None:
    """Superscripts and the like are text; so are other scripts' digits, which need not be those of a number."""
    names = ["1", "01", "2", "10", "1²2", "²", "٣", "0" * 5000 + "3", "9" * 5000, ""]
    ordered = sorted(names, key=natural_key)
    assert ordered.index("2") < ordered.index("0" * 5000 + "3") < ordered.index("10") < ordered.index("9" * 5000)
    names.reverse()
    assert sorted(names, key=natural_key) == ordered


def test_directories_of_names_that_no_one_would_choose(tmp_path: Path) -> None:
    names = ["model²-1²2.safetensors", "model²-٣.safetensors", "a\nb.safetensors", "\udcff.safetensors"]
    names += [f"x-{'9' * 100}-of-{'9' * 100}.safetensors", "x-00000-of-00000.safetensors"]
    for number, name in enumerate(names):
        write_tensors(tmp_path / name, [(str(number), "U8", [1])])
    assert sorted(weightload.resolve_safetensors_files(tmp_path)) == sorted(str(tmp_path / name) for name in names)
    assert cli.main(["verify", str(tmp_path)]) == 0


def test_tensors_that_no_shard_has_are_named_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tensors(tmp_path / "a.safetensors", [("a", "U8", [1])])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"\x1b[2J\ud800": "a.safetensors"}}))
    with pytest.raises(errors.CheckpointError, match="no shard has it"):
        weightload.resolve_safetensors_files(tmp_path)
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().err
