"""Files of a web server: the same bytes, few requests, and errors that say what the server did."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Handler, Web, hang, serving

import weightload
from weightload._remote import stores
from weightload.cli.main import main
from weightload.errors import (
    AddressError,
    CheckpointError,
    ChecksumError,
    HeaderTooSmall,
    HtmlPage,
    ReadError,
    WeightLoadError,
)

SECRET = "sig=SECRET"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    bits = torch.Generator().manual_seed(19)
    one = {f"layer.{i}.weight": torch.randn(300 + i, 257, generator=bits) for i in range(20)}
    two = {f"block.{i}": torch.randn(1500, 1031, generator=bits).bfloat16() for i in range(6)}
    two["empty"] = torch.zeros(0, 7)
    many = {f"small.{i}": torch.randn(3, generator=bits) for i in range(6000)}  # a header of half a megabyte
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for name, tensors in zip(names, (one, two, many), strict=True):
        save_file(tensors, path / name, metadata={"format": "pt"})
    index = {name: file for file, tensors in zip(names, (one, two, many), strict=True) for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with serving(folder) as server:
        yield server


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def expected(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in files_of(folder) for name, tensor in load_file(file).items()}


def require_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("kind", ["ranges", "without ranges", "without tags"])
def test_every_call_gives_the_files_bytes(web: Web, folder: Path, kind: str) -> None:
    web.ranges, web.tags = kind != "without ranges", kind != "without tags"
    addresses = [web.address(path.name) for path in files_of(folder)]
    want = expected(folder)
    require_same(dict(weightload.safetensors_weights_iterator(addresses, to_cpu=True)), want)
    target = {name: torch.full_like(tensor, 7) for name, tensor in want.items()}
    web.asked.clear()
    weightload.load_into(target, addresses)
    require_same(target, want)
    assert len(web.asked) < 20  # small tensors come together
    require_same(weightload.load_file(addresses[0]), load_file(files_of(folder)[0]))
    with weightload.safe_open(addresses[1], "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert torch.equal(handle.get_tensor("block.3"), want["block.3"])
        assert torch.equal(handle.get_slice("block.2")[10:20], want["block.2"][10:20])
        assert torch.equal(handle.get_slice("block.2")[:, 5:9], want["block.2"][:, 5:9])
        assert handle.get_tensor("empty").shape == (0, 7)
        require_same(dict(handle.prefetch()), {name: want[name] for name in handle})


def test_beside_local_files(web: Web, folder: Path) -> None:
    one, two, three = files_of(folder)
    got = dict(weightload.safetensors_weights_iterator([one, web.address(two.name), three], to_cpu=True))
    require_same(got, expected(folder))


def test_few_requests(web: Web, folder: Path) -> None:
    one, two, three = (web.address(path.name) for path in files_of(folder))
    size = [path.stat().st_size for path in files_of(folder)]
    with weightload.safe_open(two, "pt") as handle:
        assert len(handle.keys()) == 7
        assert len(web.asked) == 1
        handle.get_slice("block.2")[10:20]
        (_, _, asked) = web.asked[1]
        begin, end = map(int, asked.removeprefix("bytes=").split("-"))
        assert end + 1 - begin == 10 * 1031 * 2
        handle.get_tensor("block.4")
        assert len(web.asked) == 3
    web.asked.clear()
    with weightload.safe_open(three, "pt") as handle:
        assert len(handle.keys()) == 6000
    assert len(web.asked) == 2  # the header is longer than the first answer
    web.asked.clear()
    weightload.load_file(one)
    assert len(web.asked) <= 2 + size[0] // (8 << 20)
    web.asked.clear()
    dict(weightload.safetensors_weights_iterator([two], to_cpu=True, names={"block.5"}))
    assert len(web.asked) <= 3  # tasks end at multiples of their size


def test_parts_of_rows(web: Web, folder: Path) -> None:
    address, want = web.address(files_of(folder)[1].name), expected(folder)

    def half(name: str, shape: list[int], dtype: str) -> tuple[slice, slice] | None:
        return (slice(0, shape[0]), slice(500, 1000)) if len(shape) == 2 and shape[0] else None

    got = dict(weightload.safetensors_weights_iterator([address], to_cpu=True, shard=half))
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name][:, 500:1000] if want[name].numel() else want[name])
    assert len(web.asked) <= 8  # a request a tensor, and not one a row


def test_an_index_and_a_folder(web: Web, folder: Path) -> None:
    want = [web.address(path.name) for path in files_of(folder)]
    assert weightload.resolve_safetensors_files(web.url) == want
    assert weightload.resolve_safetensors_files(web.address("model.safetensors.index.json")) == want
    assert weightload.resolve_safetensors_files(want[0]) == want[:1]
    signed = weightload.resolve_safetensors_files(f"{web.url}/?{SECRET}")
    assert signed == [f"{address}?{SECRET}" for address in want]
    require_same(dict(weightload.safetensors_weights_iterator(signed, to_cpu=True)), expected(folder))


def test_an_index_that_leads_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with (
        serving(tmp_path) as web,
        pytest.raises(CheckpointError, match="outside its directory") as raised,
    ):
        weightload.resolve_safetensors_files(web.url)
    assert web.url in str(raised.value)
    assert "/tmp/" not in str(raised.value).replace(str(tmp_path), "")


def test_nothing_there(web: Web, tmp_path: Path) -> None:
    address = f"http://user:password@{web.url[7:]}/missing.safetensors?{SECRET}"
    with pytest.raises(FileNotFoundError) as raised:
        weightload.load_file(address)
    told = str(raised.value)
    assert "missing.safetensors" in told
    assert "SECRET" not in told
    assert "password" not in told
    assert raised.value.filename == web.address("missing.safetensors")
    with serving(tmp_path) as empty, pytest.raises(FileNotFoundError):
        weightload.resolve_safetensors_files(empty.url)


def test_names_and_passwords_go_to_the_server(web: Web, folder: Path) -> None:
    weightload.load_file(f"http://me:pass%20word@{web.url[7:]}/{files_of(folder)[0].name}")
    assert {headers["authorization"] for headers in web.headers} == {"Basic bWU6cGFzcyB3b3Jk"}


@pytest.mark.parametrize("status", [401, 403])
def test_other_credentials_are_wanted(web: Web, folder: Path, status: int) -> None:
    web.before = lambda handler: handler.reply(status) is None
    with pytest.raises(PermissionError, match=str(status)):
        weightload.load_file(web.address(files_of(folder)[0].name))


def strikes(fault: str, times: int) -> object:
    """Make a handler that spoils the first ``times`` answers that have tensors' bytes."""
    struck: list[str] = []

    def before(handler: Handler) -> bool:
        asked = handler.headers.get("Range", "")
        if asked.startswith("bytes=0-") or len(struck) == times:
            return False
        struck.append(asked)
        begin, end = map(int, asked.removeprefix("bytes=").split("-"))
        if fault == "cut off":
            total = 1 << 40
            handler.reply(206, b"x" * 100, {"Content-Range": f"bytes {begin}-{end}/{total}"}, length=end + 1 - begin)
        elif fault == "cut off, but right":
            data = (handler.server.folder / handler.path.lstrip("/")).read_bytes()
            headers = {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
            if handler.server.tags:
                headers["ETag"] = f'"{abs(hash(data))}"'
            handler.reply(206, data[begin : begin + 100], headers, length=end + 1 - begin)
        elif fault == "another range":
            data = (handler.server.folder / handler.path.lstrip("/")).read_bytes()
            headers = {"Content-Range": f"bytes {begin + 1}-{end}/{len(data)}", "ETag": f'"{abs(hash(data))}"'}
            handler.reply(206, data[begin + 1 : end + 1], headers)
        else:
            handler.reply(int(fault))
        return True

    return before


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("fault", ["500", "503", "cut off, but right"])
def test_what_may_be_tried_again_is(web: Web, folder: Path, fault: str, times: int, tags: bool) -> None:
    web.tags = tags
    web.before = strikes(fault, times)  # type: ignore[assignment]
    path = files_of(folder)[1]
    require_same(weightload.load_file(web.address(path.name)), load_file(path))


@pytest.mark.parametrize("tags", [True, False])
def test_an_opening_that_is_cut_off_is_tried_again(web: Web, folder: Path, tags: bool) -> None:
    web.tags = tags
    path = files_of(folder)[1]
    data = path.read_bytes()
    cut: list[str] = []

    def cut_off(handler: Handler) -> bool:
        if cut or not handler.headers.get("Range", "").startswith("bytes=0-"):
            return False
        cut.append(handler.path)
        headers = {"Content-Range": f"bytes 0-{(256 << 10) - 1}/{len(data)}"}
        if tags:
            headers["ETag"] = f'"{abs(hash(data))}"'
        handler.reply(206, data[:1000], headers, length=256 << 10)
        return True

    web.before = cut_off
    require_same(weightload.load_file(web.address(path.name)), load_file(path))
    assert cut


def test_a_server_that_is_away_for_a_while(web: Web, folder: Path) -> None:
    away: list[str] = []

    def be_away(handler: Handler) -> bool:
        if handler.headers["Range"].startswith("bytes=0-") or len(away) == 10:
            return False
        away.append(handler.headers["Range"])
        handler.reply(503)
        return True

    web.before = be_away
    path = files_of(folder)[0]  # which one request brings
    require_same(weightload.load_file(web.address(path.name)), load_file(path))
    assert len(set(away)) == 1


@pytest.mark.parametrize("fault", ["cut off", "another range", "416"])
def test_wrong_answers_are_errors(web: Web, folder: Path, fault: str) -> None:
    web.before = strikes(fault, 100)  # type: ignore[assignment]
    path = files_of(folder)[1]
    with pytest.raises(ReadError) as raised:
        weightload.load_file(web.address(path.name))
    assert raised.value.filename == web.address(path.name)
    assert raised.value.tensor is not None


@pytest.mark.parametrize("tags", [True, False])
def test_an_object_that_changes_is_an_error(folder: Path, tmp_path: Path, tags: bool) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4 << 20), "b": torch.ones(4 << 20)}, path)
    with serving(tmp_path) as web:
        web.tags = tags
        with weightload.safe_open(web.address(path.name), "pt") as handle:
            assert handle.get_tensor("a").sum() == 0
            save_file({"a": torch.zeros(4 << 20), "b": torch.full((5 << 20,), 2.0)}, path)
            with pytest.raises(ReadError, match="changed while it was read"):
                handle.get_tensor("b")


def test_a_server_that_sends_on_in_a_circle(web: Web) -> None:
    web.before = lambda handler: handler.reply(302, headers={"Location": handler.path}) is None
    with pytest.raises(ReadError, match="in a circle"):
        weightload.load_file(web.address("model.safetensors"))


def test_words_of_an_address_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stores.RETRIES, "max_retries", 1)
    with pytest.raises(ReadError, match="refuses connections"):
        weightload.load_file("http://127.0.0.1:1/dns%20error/timeout/certificate.safetensors")


def test_a_page_in_place_of_the_file(web: Web, folder: Path) -> None:
    page = b"<!DOCTYPE html><html>" + b" " * 1000
    web.before = lambda handler: handler.reply(200, page, {"Content-Type": "text/html"}) is None
    with pytest.raises(HtmlPage):
        weightload.load_file(web.address("model.safetensors"))


def test_packed_on_the_way(web: Web, folder: Path) -> None:
    packed = gzip.compress(files_of(folder)[0].read_bytes())
    web.before = lambda handler: handler.reply(200, packed, {"Content-Encoding": "gzip"}) is None
    with pytest.raises(ReadError, match="gzip"):
        weightload.load_file(web.address("model.safetensors"))


def test_an_empty_object(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with serving(tmp_path) as web, pytest.raises(HeaderTooSmall):
        weightload.load_file(web.address("model.safetensors"))


def test_credentials_stay_with_their_host(web: Web, folder: Path) -> None:
    with serving(folder) as other:
        target = other.address(files_of(folder)[0].name).replace("127.0.0.1", "localhost")
        web.before = lambda handler: handler.reply(302, headers={"Location": target}) is None
        weightload.load_file(f"http://me:password@{web.url[7:]}/moved.safetensors")
        assert all("authorization" in headers for headers in web.headers)
        assert other.headers
        assert not any("authorization" in headers for headers in other.headers)


def test_a_load_that_waits_for_a_server_can_be_left(web: Web, folder: Path) -> None:
    asked = hang(web)
    weights = weightload.safetensors_weights_iterator([web.address(files_of(folder)[1].name)], to_cpu=True)
    assert asked.wait(60)
    begin = time.monotonic()
    weights.close()
    assert time.monotonic() - begin < 20  # its read would have waited for half a minute
    assert not [thread for thread in os.listdir("/proc/self/task") if "weightload-read" in name_of_thread(thread)]


def name_of_thread(number: str) -> str:
    try:
        return Path(f"/proc/self/task/{number}/comm").read_text()
    except OSError:
        return ""


def test_ctrl_c(web: Web, folder: Path) -> None:
    asked = hang(web)
    script = """
        import sys, weightload
        try:
            weightload.load_file(sys.argv[1])
        except KeyboardInterrupt:
            print("stopped")
    """
    address = web.address(files_of(folder)[1].name)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), address], stdout=subprocess.PIPE, text=True
    )
    assert asked.wait(60)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=20)
    assert out == "stopped\n"


def test_forked_children_are_refused(web: Web, folder: Path) -> None:
    script = """
        import os, sys, torch, weightload, weightload.errors
        torch.set_num_threads(1)
        weightload.load_file(sys.argv[1])
        child = os.fork()
        if child == 0:
            try:
                weightload.load_file(sys.argv[1])
            except weightload.errors.WeightLoadError as error:
                os._exit(7 if "forked" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        weightload.load_file(sys.argv[1])
    """
    address = web.address(files_of(folder)[0].name)
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), address], check=True, timeout=120)


def test_the_exit_in_the_middle_of_a_load(web: Web, folder: Path) -> None:
    hang(web)
    script = """
        import sys, weightload
        weights = weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True)
    """
    address = web.address(files_of(folder)[1].name)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), address], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""


def test_from_many_threads(web: Web, folder: Path) -> None:
    address, want = web.address(files_of(folder)[0].name), load_file(files_of(folder)[0])
    failed: list[BaseException] = []
    with weightload.safe_open(address, "pt") as handle:

        def get() -> None:
            try:
                for name in handle:
                    assert torch.equal(handle.get_tensor(name), want[name])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=get) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def test_stats(web: Web, folder: Path) -> None:
    path = files_of(folder)[1]
    with weightload.safetensors_weights_iterator(web.address(path.name), to_cpu=True) as weights:
        wanted = sum(tensor.nbytes for _, tensor in weights)
    (file,) = weights.stats().files
    assert (file.path, file.read, file.wanted_bytes) == (web.address(path.name), "requested", wanted)
    assert file.bytes >= wanted


def test_commands(web: Web, folder: Path) -> None:
    for command in ("inspect", "verify"):
        done = subprocess.run(
            [sys.executable, "-m", "weightload", command, web.url], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert web.address("model-00002-of-00003.safetensors") in done.stdout


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("az://container/key", "Azure wants an account"),
        ("http://host:99999/key.safetensors", "the server's name or its port"),
        ("http:///key.safetensors", "names no server"),
        ("hf://one", "must be hf://organisation/repository"),
    ],
)
def test_addresses_that_nothing_can_be_asked_of(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    for error in (AddressError, ValueError, WeightLoadError):
        with pytest.raises(error, match=reason):
            weightload.load_file(address)
    for command in ("load", "verify", "inspect"):
        assert main([command, address]) == 2
        assert reason in capsys.readouterr().err


def test_what_a_command_does_not_take_is_repeated_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--cache", "folder", f"http://me:PASSWORD@host/model.safetensors?{SECRET}"])
    told = capsys.readouterr().err
    assert "http://host/model.safetensors" in told
    assert "PASSWORD" not in told
    assert SECRET not in told


def test_without_the_library(web: Web, folder: Path) -> None:
    script = """
        import sys, weightload
        sys.modules["obstore"] = None
        try:
            weightload.load_file(sys.argv[1])
        except ModuleNotFoundError as error:
            print(error)
    """
    address = web.address(files_of(folder)[0].name)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), address], capture_output=True, text=True)
    assert "weightload[remote]" in done.stdout


def test_checked_on_the_way(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({str(i): torch.randn(1500, 1031) for i in range(8)}, path)
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()} *{path.name}\n")
    for ranges in (True, False):
        with serving(tmp_path) as web:
            web.ranges = ranges
            address = web.address(path.name)
            assert len(dict(weightload.safetensors_weights_iterator([address], to_cpu=True, verify="sha256"))) == 8
            assert sum(name.startswith(f"/{path.name}") for _, name, _ in web.asked) <= 3 + path.stat().st_size // (
                8 << 20
            )
            assert dict(
                weightload.safetensors_weights_iterator([address], to_cpu=True, verify="sha256", names={"3"})
            ).keys() == {"3"}
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            (tmp_path / "bad.safetensors").write_bytes(data)
            (tmp_path / "SHA256SUMS").write_text(
                (tmp_path / "SHA256SUMS").read_text().replace(path.name, "bad.safetensors")
            )
            with pytest.raises(ChecksumError, match=r"bad\.safetensors"):
                dict(
                    weightload.safetensors_weights_iterator(
                        [web.address("bad.safetensors")], to_cpu=True, verify="sha256"
                    )
                )
            (tmp_path / "SHA256SUMS").write_text(
                (tmp_path / "SHA256SUMS").read_text().replace("bad.safetensors", path.name)
            )
