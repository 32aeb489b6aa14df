"""Azure's and Google's stores.

az:// by Azurite (`npm install azurite`, its `node_modules/.bin` in PATH; skipped without). gs:// by a stand-in that
answers what the library asks: of Google's emulators on PyPI none gives the tags and times that it wants.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import obstore
import pytest
import torch
from safetensors.torch import save
from servers import Handler, Web, all_told, environment, serving

import weightload
from weightload._remote.stores import place_of

AZURITE = shutil.which("azurite-blob")
ACCOUNT = "devstoreaccount1"
# Azurite's own, which is in its documentation.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = str(tmp_path_factory.mktemp("azurite"))
    command = [str(AZURITE), "--silent", "--skipApiVersionCheck", "--location", folder, "--blobPort", str(port)]
    with subprocess.Popen(command) as server:
        url = f"http://127.0.0.1:{port}/{ACCOUNT}"
        make_container(f"{url}/weights")
        with environment(AZURE_STORAGE_ACCOUNT_NAME=ACCOUNT, AZURE_STORAGE_ACCOUNT_KEY=KEY, AZURE_STORAGE_ENDPOINT=url):
            yield url
        server.terminate()


def make_container(url: str) -> None:
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
    text = (
        f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/weights\nrestype:container"
    )
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {ACCOUNT}:{signature}",
        "Content-Length": "0",
    }
    request = urllib.request.Request(f"{url}?restype=container", method="PUT", headers=headers)
    deadline = time.monotonic() + 60
    while True:  # it takes a while to start
        try:
            urllib.request.urlopen(request)
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


@pytest.mark.skipif(AZURITE is None, reason="there is no azurite-blob")
def test_a_container(account: str, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2000, 1001), "b": torch.arange(7)}
    place = place_of("az://weights/org/model/model.safetensors")
    obstore.put(place.store, place.path, save(tensors))
    files = weightload.resolve_safetensors_files("az://weights/org/model")
    assert files == ["az://weights/org/model/model.safetensors"]
    got = weightload.load_file(files[0])
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(FileNotFoundError):
        weightload.load_file("az://weights/org/model/missing.safetensors")
    with environment(AZURE_STORAGE_ACCOUNT_KEY=base64.b64encode(b"another").decode()), pytest.raises(PermissionError):
        weightload.load_file(files[0])


LIST = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://doc.s3.amazonaws.com/2006-03-01"><Name>weights</Name><IsTruncated>false</IsTruncated>
{0}</ListBucketResult>"""
ENTRY = """<Contents><Key>{0}</Key><Size>{1}</Size><ETag>"x"</ETag>
<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"""


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Serves what is in the bucket "weights" as Google's XML API does: objects, ranges, and one page of a list."""
    bucket = tmp_path / "google" / "weights"
    bucket.mkdir(parents=True)
    monkeypatch.setattr(Handler, "extra", {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"})

    def list_it(handler: Handler) -> bool:
        parts = urlsplit(handler.path)
        if parts.path.strip("/") != "weights":
            return False
        prefix = parse_qs(parts.query).get("prefix", [""])[0]
        found = {str(path.relative_to(bucket)): path.stat().st_size for path in bucket.rglob("*") if path.is_file()}
        entries = [ENTRY.format(name, size) for name, size in found.items() if name.startswith(prefix)]
        handler.reply(200, LIST.format("".join(entries)).encode(), {"Content-Type": "application/xml"})
        return True

    with serving(bucket.parent) as web:
        web.before = list_it
        with environment(GOOGLE_BASE_URL=web.url, GOOGLE_BEARER_TOKEN="VERYSECRET"):
            yield web


def test_a_bucket_of_google(google: Web) -> None:
    tensors = {name: torch.randn(2000, 1001) for name in "ab"}
    folder = google.folder / "weights" / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save(tensors))
    files = weightload.resolve_safetensors_files("gs://weights/org/model")
    assert files == ["gs://weights/org/model/model.safetensors"]
    for got in (weightload.load_file(files[0]), dict(weightload.safetensors_weights_iterator(files, to_cpu=True))):
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert {headers["authorization"] for headers in google.headers} == {"Bearer VERYSECRET"}
    with pytest.raises(FileNotFoundError):
        weightload.load_file("gs://weights/org/model/missing.safetensors")


@pytest.mark.parametrize("status", [401, 403])
def test_google_wants_other_credentials(google: Web, status: int) -> None:
    google.before = lambda handler: handler.reply(status) is None
    with pytest.raises(PermissionError) as raised:
        weightload.load_file("gs://weights/model.safetensors")
    assert "VERYSECRET" not in all_told(raised.value)
