"""az://, by Azurite (`npm install azurite`, its `node_modules/.bin` in PATH); skipped without."""

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

import obstore
import pytest
import torch
from safetensors.torch import save
from servers import environment

import weightload
from weightload._remote.stores import place_of

AZURITE = shutil.which("azurite-blob")
ACCOUNT = "devstoreaccount1"
# Azurite's own, which is in its documentation.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

pytestmark = pytest.mark.skipif(AZURITE is None, reason="there is no azurite-blob")


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
