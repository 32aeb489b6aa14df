"""Every rule of the format has a name, and the verdict is safetensors' wherever it has one."""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import BACKENDS, DTYPE_BITS, entry, file_bytes, write_tensors
from safetensors import SafetensorError
from support.headers import ACCEPTED, GOOD, U8, VIOLATIONS, text

import weightload
from weightload import errors
from weightload._checkpoint.selection import open_files


@pytest.mark.parametrize(("rule", "content"), VIOLATIONS, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(VIOLATIONS)])
def test_every_violation_has_its_name(tmp_path: Path, rule: str, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(getattr(errors, rule)) as caught:
        weightload.load_file(path)
    assert type(caught.value).__name__ == rule
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)
    with pytest.raises(getattr(errors, rule)):
        weightload.load(content)
    # safetensors refuses it too, and the exception fits the same except clause.
    with pytest.raises(SafetensorError):
        safetensors.torch.load_file(path)
    assert isinstance(caught.value, SafetensorError)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"error": "Repository not found"}', "JSON"),
        (b"\n[1, 2, 3, 4]", "JSON"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip"),
        (b"\x28\xb5\x2f\xfd\x24\x00\x01\x00\x00\x99\xe9\xd8\x51", "zstd"),
        (b"GGUF\3\0\0\0" + bytes(16), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(16), "HDF5"),
    ],
)
def test_files_of_other_formats_are_recognised(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises((errors.HeaderTooLarge, errors.InvalidHeaderLength), match=f"it looks like .*{words}"):
        weightload.load_file(path)


def test_what_torch_and_numpy_save_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for save, words in (
        (lambda: torch.save({"a": torch.zeros(3)}, path), "a zip archive, as torch.save"),
        (lambda: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False), "a pickle"),
        (lambda: np.save(path.open("wb"), np.zeros(3)), "NumPy"),
    ):
        save()
        with pytest.raises((errors.HeaderTooLarge, errors.InvalidHeaderLength), match=f"it looks like .*{words}"):
            weightload.load_file(path)


def test_a_truncated_file_is_not_taken_for_another(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((0x0280).to_bytes(8, "little") + b'{"a":')
    with pytest.raises(errors.InvalidHeaderLength) as caught:
        weightload.load_file(path)
    assert "looks like" not in str(caught.value)


def test_every_rule_has_a_test() -> None:
    elsewhere = {"DuplicateTensor", "NotARegularFile"}
    assert {rule for rule, _ in VIOLATIONS} | elsewhere == {
        rule.__name__ for rule in errors.HeaderError.__subclasses__()
    }


@pytest.mark.parametrize("content", ACCEPTED, ids=range(len(ACCEPTED)))
def test_accepts_what_safetensors_accepts(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(content)
    reference = safetensors.torch.load_file(path)
    ours = weightload.load_file(path)
    assert {name: (t.dtype, t.shape, t.tolist()) for name, t in ours.items()} == {
        name: (t.dtype, t.shape, t.tolist()) for name, t in reference.items()
    }
    with safetensors.safe_open(path, framework="pt") as file:
        assert open_files([path])[0].metadata == file.metadata()


@pytest.mark.parametrize("depth", [123, 124, 125, 126, 127, 128, 129])
def test_the_nesting_limit_is_safetensors(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.safetensors"
    path.write_bytes(file_bytes(text(GOOD + ',"x":' + "[" * depth + "]" * depth), b"1"))
    try:
        safetensors.torch.load_file(path)
    except SafetensorError:
        with pytest.raises(errors.NestingTooDeep):
            weightload.load_file(path)
    else:
        weightload.load_file(path)


def test_duplicate_tensor_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.safetensors"
    one = b'"a":{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]}'
    path.write_bytes(file_bytes(b"{" + one % (1, 0, 1) + b"," + one % (1, 1, 2) + b"}", b"12"))
    with pytest.raises(errors.DuplicateTensor) as caught:
        weightload.load_file(path)
    assert caught.value.tensor == "a"


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_all_dtypes_of_safetensors_are_known_to_the_header(tmp_path: Path, dtype: str) -> None:
    path = write_tensors(tmp_path / "one.safetensors", [("a", dtype, [8])])
    (name, found, shape, begin, end) = open_files([path])[0].tensors()[0]
    assert (name, found, shape, end - begin) == ("a", dtype, (8,), DTYPE_BITS[dtype])


def test_equal_offsets_keep_the_headers_order(tmp_path: Path) -> None:
    path = tmp_path / "empties.safetensors"
    path.write_bytes(file_bytes({"z": entry("U8", [0], 0, 0), "b": U8, "a": entry("U8", [0], 0, 0)}, b"1"))
    assert open_files([path])[0].names() == ["z", "a", "b"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(errors.NotARegularFile, match=str(path)):  # and a FIFO does not wait for a writer
            weightload.load_file(path)


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        weightload.load_file(path)
    assert (caught.value.errno, caught.value.filename) == (2, str(path))


def test_other_system_errors_keep_their_errno(tmp_path: Path) -> None:
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links") as caught:
        weightload.load_file(loop)
    assert caught.value.errno == 40


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.safetensors"
    Path(os.fsdecode(path)).write_bytes(file_bytes({"a": U8}, b"12"))
    with pytest.raises(errors.MetadataIncompleteBuffer) as caught:
        weightload.load_file(path)
    assert caught.value.filename == os.fsdecode(path)


def test_a_header_of_100_000_tensors(tmp_path: Path) -> None:
    path = write_tensors(
        tmp_path / "many.safetensors",
        [(f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.down_proj.weight", "BF16", [2, 4]) for i in range(100_000)],
    )
    ours = weightload.load_file(path)
    reference = safetensors.torch.load_file(path)
    assert len(ours) == 100_000
    assert all(
        ours[name].view(torch.uint8).equal(tensor.view(torch.uint8)) for name, tensor in list(reference.items())[::97]
    )


def test_memory_is_bounded_whatever_the_header_claims(tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000) + b"{")
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(errors.InvalidHeaderDeserialization):
        weightload.load_file(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_planning_is_bounded_whatever_the_file_claims(tmp_path: Path, backend: str) -> None:
    """A file of an exabyte that takes 4 KiB of disk: far fewer reads are planned than it would take."""
    content = file_bytes({f"t{i}": entry("U8", [2**57], i * 2**57, (i + 1) * 2**57) for i in range(8)})
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        path = Path(folder) / "exabyte.safetensors"
        path.write_bytes(content)
        try:
            os.truncate(path, len(content) + 2**60)
        except OSError as error:
            pytest.skip(f"no file system here has files of an exabyte: {error}")
        # Mapping comes before planning, and is refused.
        words = "reads of" if backend == "pread" else "cannot map the file"
        with pytest.raises(errors.OutOfMemoryError, match=words):
            weightload.safetensors_weights_iterator([path], to_cpu=True, backend=backend)  # type: ignore[arg-type]
