"""pip install under build isolation against the torch that is there; and the check at import."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import weightload


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is to be installed, so that nothing built here is used and nothing is left behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("csrc", "weightload"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def make_environment(folder: Path, with_torch: bool) -> Path:
    """A virtual environment; torch and what it needs come by a .pth file from the one the tests run in."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if with_torch:
        packages = next(folder.glob("lib/python*/site-packages"))
        (packages / "torch.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "python"


def plain_environment() -> dict[str, str]:
    """Return this process's environment without variables that lead to the package that is built here."""
    return {
        key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("WEIGHTLOAD_")
    }


def pip(python: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", *map(str, arguments)]
    environment = plain_environment() | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def test_a_wheel_built_under_isolation_is_for_the_torch_of_the_environment(tmp_path: Path, source: Path) -> None:
    """Which pip installs in one step as well."""
    builder = make_environment(tmp_path / "builder", with_torch=True)
    folder = tmp_path / "dist"
    done = pip(builder, "wheel", "-v", "--no-cache-dir", "--no-deps", "-w", folder, source, WEIGHTLOAD_WHEEL="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Collecting torch" not in done.stdout
    (wheel,) = folder.iterdir()
    label = f"+torch{torch.__version__.replace('+', '.')}"
    assert wheel.name.startswith(f"weightload-{weightload.__version__}{label}-cp3")
    python = make_environment(tmp_path / "env", with_torch=True)
    done = pip(python, "install", "--no-index", "--no-deps", wheel)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"weightload {weightload.__version__}{label}" in " ".join(pip(python, "list").stdout.split())
    script = "import weightload, torch, pathlib; from weightload import _C; "
    script += "print(weightload.__version__, torch.__version__, _C.__file__, pathlib.Path(weightload.__file__).parent)"
    plain = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path, "env": plain_environment()}
    run = subprocess.run([str(python), "-c", script], **plain)  # type: ignore[call-overload]
    mine, torchs, extension, package = run.stdout.split()
    assert mine == weightload.__version__
    assert torchs == torch.__version__
    assert str(tmp_path) in extension
    assert (Path(package) / "py.typed").exists()
    assert (Path(package) / "_C.pyi").exists()
    command = subprocess.run([str(python.parent / "weightload"), "--version"], **plain)  # type: ignore[call-overload]
    assert weightload.__version__ in command.stdout


def test_install_without_torch_names_the_command_to_run(tmp_path: Path, source: Path) -> None:
    python = make_environment(tmp_path / "env", with_torch=False)
    done = pip(python, "install", "-v", "--no-cache-dir", "--no-deps", source)
    assert done.returncode != 0
    assert "pip install 'torch>=2.8'" in done.stdout + done.stderr
    assert "Collecting torch" not in done.stdout
    assert "Traceback" not in (done.stdout + done.stderr).split("weightload: it is compiled")[0].split("Getting")[-1]


def test_metadata() -> None:
    assert version("weightload") == weightload.__version__
    plain = [line for line in requires("weightload") or [] if "extra" not in line]
    assert not any(line.startswith("torch") for line in plain)  # an installer must not replace torch


def import_with_torch(number: str) -> subprocess.CompletedProcess[str]:
    script = f"import torch; torch.__version__ = {number!r}; import weightload"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_another_torch_is_refused_in_one_sentence() -> None:
    done = import_with_torch("2.8.0+cu128")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: weightload was built for torch ")
    assert torch.__version__ in last
    assert "2.8.0+cu128" in last
    assert "pip install" in last
    assert import_with_torch(torch.__version__).returncode == 0


def test_import_brings_in_nothing_slow() -> None:
    script = "import torch, sys; before = set(sys.modules); import weightload; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"tqdm", "numpy", "safetensors.torch", "matplotlib"} & set(done.stdout.split())
