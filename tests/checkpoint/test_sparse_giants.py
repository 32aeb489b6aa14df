"""Sparse giants: files that claim terabytes, and have them, and occupy a page."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from conftest import entry, file_bytes, run_script
from support.ways import ANY_TARGET, assert_nothing_held

import weightload
from weightload import errors


def sparse(path: Path, header: bytes, size: int) -> Path:
    path.write_bytes(header)
    os.truncate(path, size)
    return path


def giant(path: Path, size: int) -> Path:
    """A valid file of one tensor of that many bytes of nothing, and a small one."""
    header = file_bytes({"giant": entry("U8", [size], 0, size), "small": entry("U8", [5], size, size + 5)})
    return sparse(path, header, len(header) + size + 5)


def test_memory_is_bounded_whatever_a_file_claims(tmp_path: Path) -> None:
    """Each file in a process that may have 700 MiB more than it has; the largest header is 100 MB."""
    one = b'"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}'
    files = [
        sparse(tmp_path / "claims.safetensors", struct.pack("<Q", 100_000_000) + b"{", 2**42),
        sparse(tmp_path / "zeros.safetensors", struct.pack("<Q", 10**8), 10**8 + 8),
        sparse(tmp_path / "more.safetensors", struct.pack("<Q", 10**8 + 1), 2**42),
        sparse(tmp_path / "most.safetensors", struct.pack("<Q", 2**64 - 1), 2**42),
        giant(tmp_path / "longer.safetensors", 2**42),
    ]
    os.truncate(files[-1], 2**43)
    for number, inside in enumerate([b"0," * 10_000_000 + b"0", b"[" * 100 + b"]" * 100 + b"0"]):
        files.append(tmp_path / f"shape{number}.safetensors")
        files[-1].write_bytes(file_bytes(b"{" + one % inside + b"}", b"1"))
    script = """
        import resource, sys, torch, weightload
        from weightload.cli import main as cli
        weightload.load(b"\\2\\0\\0\\0\\0\\0\\0\\0{}")
        used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), resource.RLIM_INFINITY))
        ways = [weightload.load_file, lambda path: weightload.load_file(path, backend="pread"),
                lambda path: weightload.load_into({"a": torch.zeros(1)}, path)]
        for path in sys.argv[1:]:
            for way in ways:
                try:
                    way(path)
                except weightload.HeaderError as error:
                    assert error.filename == path
                else:
                    raise AssertionError(path)
            assert cli.main(["verify", path]) == 1
    """
    done = run_script(script, *files)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_sparse_giant_is_mapped_or_refused(tmp_path: Path) -> None:
    """2 TiB that occupy a page: more than any memory to read them into. Its small tensor can be had."""
    path = giant(tmp_path / "giant.safetensors", 2**41)
    ways = [lambda: weightload.load_file(path, backend="pread"), lambda: weightload.load_into(dict(ANY_TARGET), path)]
    with pytest.raises(errors.OutOfMemoryError, match="do not fit into the machine") as caught:
        ways[0]()
    assert caught.value.filename == str(path)
    del caught
    with pytest.raises(errors.StateDictError):
        ways[1]()
    with pytest.raises(errors.OutOfMemoryError) as caught:
        next(weightload.safetensors_weights_iterator([path], to_cpu=True, backend="pread"))
    assert (caught.value.tensor, caught.value.errno) == ("giant", 12)
    del caught
    mapped = weightload.load_file(path)
    assert mapped["giant"].shape == (2**41,)
    assert mapped["giant"][12345] == 0
    (small,) = weightload.safetensors_weights_iterator([path], to_cpu=True, backend="pread", names=["small"])
    assert torch.equal(small[1], torch.zeros(5, dtype=torch.uint8))
    assert_nothing_held()


def test_a_sparse_giant_of_misaligned_tensors_is_refused(tmp_path: Path) -> None:
    """They are copied into private memory, each of which would fit."""
    size, count = 2**32, 1000
    tensors = {"odd": entry("U8", [1], 0, 1)}
    tensors |= {f"{i}": entry("F32", [size // 4], 1 + i * size, 1 + (i + 1) * size) for i in range(count)}
    header = file_bytes(tensors)
    path = sparse(tmp_path / "misaligned.safetensors", header, len(header) + 1 + size * count)
    with pytest.raises(errors.OutOfMemoryError, match="do not fit into the machine"):
        weightload.load_file(path)


def test_verifying_a_sparse_giant_can_be_interrupted(tmp_path: Path) -> None:
    path = giant(tmp_path / "giant.safetensors", 2**41)
    script = """
        import signal, sys
        from weightload.cli import main as cli
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        sys.exit(cli.main(["verify", sys.argv[1]]))
    """
    assert run_script(script, path).returncode == 130
