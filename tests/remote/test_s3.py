"""Buckets, by a server that speaks S3."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save, save_file
from servers import environment

import weightload
import weightload.errors
from weightload._remote.source import open_addresses

BUCKET = "weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    bits = torch.Generator().manual_seed(20)
    of = {name: torch.randn(700, 1031, generator=bits) for name in ("a", "b", "c", "d")}
    save_file({"a": of["a"], "b": of["b"]}, path / "model-00001-of-00002.safetensors")
    save_file({"c": of["c"], "d": of["d"]}, path / "model-00002-of-00002.safetensors")
    index = {name: f"model-0000{1 + (name > 'b')}-of-00002.safetensors" for name in of}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({"lora": torch.ones(3)}, path / "adapter_model.safetensors")
    return path


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with environment(
        AWS_ACCESS_KEY_ID="someone",
        AWS_SECRET_ACCESS_KEY="VERYSECRET",
        AWS_REGION="us-east-1",
        AWS_ENDPOINT_URL=url,
    ):
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        for path in folder.iterdir():
            client.upload_file(str(path), BUCKET, f"org/my model/{path.name}")
        yield url
    server.stop()


ADDRESS = f"s3://{BUCKET}/org/my model"


def expected(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("model-*.safetensors")) for name, tensor in load_file(file).items()
    }


def require_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_prefix_an_index_and_a_file(endpoint: str, folder: Path) -> None:
    with pytest.warns(weightload.PassedOverWarning, match="adapter_model"):
        files = weightload.resolve_safetensors_files(ADDRESS)
    assert files == [f"{ADDRESS}/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert weightload.resolve_safetensors_files(f"{ADDRESS}/model.safetensors.index.json") == files
    require_same(dict(weightload.safetensors_weights_iterator(files, to_cpu=True)), expected(folder))
    require_same(weightload.load_file(files[0]), load_file(folder / "model-00001-of-00002.safetensors"))
    assert weightload.resolve_safetensors_files(f"s3://{BUCKET}/org", subfolder="my model", variant=None)


def test_copies(endpoint: str, folder: Path, tmp_path: Path) -> None:
    files = [f"{ADDRESS}/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for kept in (False, True):
        weights = weightload.safetensors_weights_iterator(files, to_cpu=True, cache=tmp_path)
        require_same(dict(weights), expected(folder))
        assert all(file.path.startswith(str(tmp_path)) == kept for file in weights.stats().files)
    copies = sorted(tmp_path.glob("*/*"), key=lambda path: path.name)
    assert [path.read_bytes() for path in copies] == [(folder / path.name).read_bytes() for path in copies]
    assert len(copies) == 2
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    other = {name: torch.ones(700, 1031) for name in ("a", "b")}
    try:
        client.put_object(Bucket=BUCKET, Key="org/my model/model-00001-of-00002.safetensors", Body=save(other))
        require_same(weightload.load_file(files[0], cache=tmp_path), other)
    finally:
        client.upload_file(str(folder / copies[0].name), BUCKET, f"org/my model/{copies[0].name}")


def test_what_is_not_there(endpoint: str) -> None:
    with pytest.raises(FileNotFoundError):
        weightload.load_file(f"{ADDRESS}/nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="No safetensors files"):
        weightload.resolve_safetensors_files(f"s3://{BUCKET}/org/another")
    with pytest.raises(FileNotFoundError):
        weightload.load_file("s3://no-such-bucket/model.safetensors")


def test_without_credentials(endpoint: str) -> None:
    script = """
        import os, sys, weightload
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            if "KEY" in name:
                del os.environ[name]
        os.environ["AWS_METADATA_ENDPOINT"] = "http://127.0.0.1:1"  # of a machine that is none of AWS's
        try:
            weightload.load_file(sys.argv[1])
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), f"{ADDRESS}/model-00001-of-00002.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "credentials" in done.stdout, done.stdout + done.stderr


def test_secrets_are_not_told(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        weightload.load_file(f"{ADDRESS}/nothing.safetensors")
    assert "VERYSECRET" not in str(raised.value) + caplog.text


RANKS = """
    import json, os, sys, torch, weightload
    import torch.distributed as dist
    dist.init_process_group("gloo")
    weights = weightload.safetensors_weights_iterator(sys.argv[1:], device="cpu")
    got = {name: tensor.clone() for name, tensor in weights}
    asked = sum(file.bytes for file in weights.stats().files)
    assert asked < 0.6 * sum(tensor.nbytes for tensor in got.values()), weights.stats()
    digests = json.loads(os.environ["DIGESTS"])
    weights = weightload.safetensors_weights_iterator(sys.argv[1:], device="cpu", verify=digests)
    assert all(torch.equal(tensor, got[name]) for name, tensor in weights)
    asked = sum(file.bytes for file in weights.stats().files)
    assert (asked > 0) == (dist.get_rank() == 0), weights.stats()
    try:
        wrong = digests | {sys.argv[2].rpartition("/")[2]: 64 * "0"}
        dict(weightload.safetensors_weights_iterator(sys.argv[1:], device="cpu", verify=wrong))
        raise SystemExit("not noticed")
    except weightload.errors.ChecksumError as error:
        assert error.filename == sys.argv[2], error
    torch.save(got, os.environ["OUT"] + os.environ["RANK"])
    dist.destroy_process_group()
"""


def test_ranks_ask_for_each_byte_once(endpoint: str, folder: Path, tmp_path: Path) -> None:
    files = [f"{ADDRESS}/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    with environment(OUT=f"{tmp_path}/", GLOO_SOCKET_IFNAME="lo", DIGESTS=json.dumps(digests)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*launch, str(script), *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        require_same(torch.load(f"{tmp_path}/{rank}"), expected(folder))


def test_no_thread_is_left_behind(endpoint: str) -> None:
    weightload.load_file(f"{ADDRESS}/model-00001-of-00002.safetensors")
    assert [thread.name for thread in threading.enumerate()].count("weightload-remote") == 1


def test_signed_requests_need_no_library(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By HTTP without TLS the core takes bytes from its own connections, once the object is open."""
    name = sorted(folder.glob("model-*.safetensors"))[-1].name
    (file,) = open_addresses([f"{ADDRESS}/{name}"])

    def ask(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(file.remote, "ask", ask)
    memory = bytearray(file.size - (256 << 10))
    file.read_into(256 << 10, memory)
    assert memory == (folder / name).read_bytes()[256 << 10 :]


def test_a_bucket_for_which_nobody_signs(endpoint: str, folder: Path) -> None:
    """The library does without."""
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="public", ACL="public-read")
    for path in folder.iterdir():
        client.upload_file(str(path), "public", path.name, ExtraArgs={"ACL": "public-read"})
    with environment(AWS_SKIP_SIGNATURE="true"):  # for which keys that are there are not told
        (file,) = open_addresses(["s3://public/model-00001-of-00002.safetensors"])
        assert file.remote.begin_direct(1 << 20, 1000) is None
        files = weightload.resolve_safetensors_files("s3://public")
        require_same(dict(weightload.safetensors_weights_iterator(files, to_cpu=True)), expected(folder))
