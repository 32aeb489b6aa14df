"""verify= by the CRCs that stores keep of whole objects, by the package awscrt; most is skipped without."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks.groups import assert_done, run_ranks

import weightload
from weightload._verify import checker, hashes
from weightload.errors import CheckpointError, ChecksumError, ReadError

POLYNOMIALS = {"crc32c": (32, 0x82F63B78), "crc64nvme": (64, 0x9A6C9329AC4BC9B5)}  # reflected


def crc(data: bytes, kind: str) -> int:
    """By the definition, a byte at a time."""
    bits, polynomial = POLYNOMIALS[kind]
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
        table.append(value)
    most = (1 << bits) - 1
    value = most
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 255]
    return value ^ most


def digest(path: Path, kind: str, form: str = "hexadecimal") -> str:
    raw = crc(path.read_bytes(), kind).to_bytes(POLYNOMIALS[kind][0] // 8, "big")
    return f"{kind}:{base64.b64encode(raw).decode() if form == 'base64' else raw.hex().upper()}"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two of 400 KB."""
    for number in range(2):
        save_file({f"{number}.{i}": torch.randn(100, 100 + i) for i in range(10)}, tmp_path / f"{number}.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files have many, of odd numbers of bytes."""
    pytest.importorskip("awscrt.checksums")
    monkeypatch.setattr(checker, "PART", 40_001)
    monkeypatch.setattr(checker, "CACHED_PIECE", 9_999)


def test_the_definition() -> None:
    assert crc(b"123456789", "crc32c") == 0xE3069283
    assert crc(b"123456789", "crc64nvme") == 0xAE8B14860A799888


@pytest.mark.parametrize("kind", POLYNOMIALS)
def test_crcs_of_pieces(kind: str) -> None:
    pytest.importorskip("awscrt.checksums")
    numbers = random.Random(7)
    data = numbers.randbytes(50_000)
    for count in (0, 1, 7, 4096, 50_000):
        whole = hashes.Crc(kind)
        cuts = [0, *sorted(numbers.choices(range(count + 1), k=5)), count]
        for begin, end in itertools.pairwise(cuts):
            piece = hashes.Crc(kind)
            middle = (begin + end) // 2
            piece.update(memoryview(data)[begin:middle])
            piece.update(bytearray(data[middle:end]))
            whole.append(piece)
        assert int(whole.hexdigest(), 16) == crc(data[:count], kind)
        assert len(whole.hexdigest()) == POLYNOMIALS[kind][0] // 4


@pytest.mark.parametrize("form", ["hexadecimal", "base64"])
@pytest.mark.parametrize("kind", POLYNOMIALS)
def test_files(files: list[Path], parts: None, kind: str, form: str) -> None:
    verify = {path.name: digest(path, kind, form) for path in files}
    got = dict(weightload.safetensors_weights_iterator(files, to_cpu=True, verify=verify))
    for path in files:
        for name, tensor in load_file(path).items():
            assert torch.equal(got[name], tensor)
        assert weightload.load_file(path, verify=verify).keys() == load_file(path).keys()
    target = {name: torch.zeros_like(tensor) for name, tensor in got.items()}
    weightload.load_into(target, files, verify=verify)
    assert all(torch.equal(tensor, got[name]) for name, tensor in target.items())
    assert not [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]


@pytest.mark.parametrize("at", [39_999, 40_000, 40_001, 40_002, 200_000, -1])
@pytest.mark.parametrize("kind", POLYNOMIALS)
def test_a_bit_is_noticed(files: list[Path], parts: None, kind: str, at: int) -> None:
    """In the middle of parts, and where they meet."""
    verify = {path.name: digest(path, kind) for path in files}
    data = bytearray(files[1].read_bytes())
    data[at] ^= 1
    files[1].write_bytes(data)
    with pytest.raises(ChecksumError, match=kind.upper()) as raised:
        weightload.load_file(files[1], verify=verify)
    assert verify[files[1].name].partition(":")[2].lower() in str(raised.value)
    assert digest(files[1], kind).partition(":")[2].lower() in str(raised.value)
    assert raised.value.filename == str(files[1])


def test_parts_in_another_order(files: list[Path], parts: None) -> None:
    """A file with two equally large parts exchanged is refused. It has the same bytes: no sum of theirs would tell."""
    data = files[0].read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    first, second = 80_002, 120_003
    assert header < first
    changed = data[:first] + data[second : second + 40_001] + data[first:second] + data[second + 40_001 :]
    verify = {files[0].name: digest(files[0], "crc32c")}
    files[0].write_bytes(changed)
    with pytest.raises(ChecksumError):
        weightload.load_file(files[0], verify=verify)


def test_beside_a_sha256(files: list[Path], parts: None) -> None:
    right = hashlib.sha256(files[0].read_bytes()).hexdigest()
    for value in (right, f"sha256:{right.upper()}"):
        verify = {files[0].name: value, files[1].name: digest(files[1], "crc64nvme")}
        assert len(dict(weightload.safetensors_weights_iterator(files, to_cpu=True, verify=verify))) == 20
    with pytest.raises(ChecksumError, match="CRC64NVME"):
        verify[files[1].name] = f"crc64nvme:{0:016x}"
        dict(weightload.safetensors_weights_iterator(files, to_cpu=True, verify=verify))


def test_reads_that_fail(files: list[Path], parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = {path.name: digest(path, "crc32c") for path in files}
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, backend="pread", verify=verify)
    next(weights)
    weights.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]
    real = hashes.Crc.update

    def failing(self: hashes.Crc, data: object) -> None:
        real(self, data)
        raise ReadError("in the middle")

    monkeypatch.setattr(hashes.Crc, "update", failing)
    with pytest.raises(ReadError, match="in the middle"):
        dict(weightload.safetensors_weights_iterator(files, to_cpu=True, verify=verify))


@pytest.mark.parametrize(
    "value",
    ["crc32c:", "crc32c:123", "crc32c:1234567", "crc32c:123456789", "crc32c:yZRlqg", "crc32c:yZRlqg==-3",
     "crc32:12345678", "crc64nvme:12345678", "crc64nvme:yZRlqg==", ":12345678", "12345678", "yZRlqg==",
     "CRC32C:12345678",
     "md5:" + 32 * "0", "crc32c:12345678:", b"crc32c:12345678", None],
)  # fmt: skip
def test_what_is_none(files: list[Path], value: object) -> None:
    with pytest.raises(ValueError, match="CRC of a whole object"):
        weightload.load_file(files[0], verify={files[0].name: value})  # type: ignore[dict-item]


def test_two_of_one_name(files: list[Path]) -> None:
    with pytest.raises(CheckpointError, match="two digests"):
        weightload.load_file(files[0], verify={files[0].name: "crc32c:12345678", f"./{files[0].name}": 64 * "0"})


def test_without_the_library(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awscrt.checksums", None)
    with pytest.raises(ModuleNotFoundError, match=r"weightload\[crc\]"):
        weightload.load_file(files[0], verify={files[0].name: "crc32c:12345678"})


RANKS = """
import json
from weightload import errors
verify, *paths = json.loads(sys.argv[4])
for digests, fails in ((verify, False), (verify | {os.path.basename(paths[1]): "crc32c:00000000"}, True)):
    try:
        weights = weightload.safetensors_weights_iterator(
            paths, device="cpu", group=dist.group.WORLD, strategy="striped", verify=digests)
        assert len(dict(weights)) == 20 and not fails
    except errors.ChecksumError as error:
        assert fails and "CRC32C" in str(error) and error.filename == paths[1], error
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_ranks(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("awscrt.checksums")
    verify = {path.name: digest(path, "crc32c") for path in files}
    (tmp_path / "ranks").mkdir()
    assert_done(run_ranks(RANKS, 2, tmp_path / "ranks", json.dumps([verify, *map(str, files)])))
