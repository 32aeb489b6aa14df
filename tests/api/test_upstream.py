"""safetensors' own tests of its Python API, with weightload in its place.

They are no part of this repository: the source archive of the release is fetched from the package index once, checked
against its digest, and kept under .build/. Without a network the test is skipped.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

import pytest
from conftest import ROOT

ARCHIVE = "safetensors-0.8.0.tar.gz"
SHA256 = "fabaf3e0f18a6618d9b36560682562157f77c2b71fcffc7b432be2baed9d753d"
FILES = ["test_simple", "test_pt_comparison", "test_pt_model", "test_pread_backend", "test_multithreaded"]

# Read by pytest before the tests import anything. What they import from safetensors.torch looks these names up there.
PLUGIN = """
    import safetensors, safetensors.torch
    import weightload

    for name in ("load_file", "load", "load_model", "safe_open"):
        setattr(safetensors.torch, name, getattr(weightload, name))
    safetensors.safe_open = weightload.safe_open
"""


def fetch(to: Path) -> None:
    """The archive, from the package index that pip is configured for."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    )
    index = os.environ.get("PIP_INDEX_URL") or asked.stdout.strip() or "https://pypi.org/simple"
    page = index.rstrip("/") + "/safetensors/"
    with urllib.request.urlopen(urllib.request.Request(page, headers={"Accept": "text/html"}), timeout=30) as answer:
        listing = answer.read().decode()
    link = re.search(rf'href="([^"]*{re.escape(ARCHIVE)})', listing)
    assert link, f"{page} has no {ARCHIVE}"
    with urllib.request.urlopen(urljoin(page, link[1]), timeout=60) as answer:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(answer.read())


@pytest.fixture(scope="module")
def upstream() -> Path:
    """safetensors' folder of Python tests."""
    archive = ROOT / ".build" / "upstream" / ARCHIVE
    if not archive.exists():
        try:
            fetch(archive)
        except OSError as error:
            pytest.skip(f"the package index cannot be reached: {error}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    folder = archive.parent / ARCHIVE.removesuffix(".tar.gz")
    if not folder.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(archive.parent, filter="data")
    return folder / "bindings" / "python"


def test_safetensors_own_tests_pass(upstream: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "weightload_in_its_place.py"
    plugin.write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "tests" / "data").mkdir(parents=True)  # where the tests write
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        plugin.stem,
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [*command, *(str(upstream / "tests" / f"{name}.py") for name in FILES)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # As many tests pass with safetensors itself; those that are skipped need an accelerator.
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 63
