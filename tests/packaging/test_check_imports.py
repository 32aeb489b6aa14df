"""The check of includes and imports: nothing is wrong here, and what is planted is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import check_imports
import pytest
from conftest import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small source tree with nothing wrong in it."""
    files = {
        "csrc/base/error.h": "#include <string>\n",
        "csrc/file/file.cpp": '#include "base/error.h"\n#include "file/file.h"\n',
        "weightload/__init__.py": "from weightload._load.load import load\n",
        "weightload/_C.pyi": "",
        "weightload/settings.py": "from weightload._base.paths import as_text\n",
        "weightload/_base/paths.py": "import os\nfrom weightload import _C\n",
        "weightload/_load/__init__.py": "",
        "weightload/_load/load.py": "from weightload import _C, settings\nfrom weightload._group import one\n",
        "weightload/_group/__init__.py": "from . import one\n",
        "weightload/_group/one.py": "from .._base.paths import as_text\n",
        "weightload/cli/main.py": "from weightload._load.load import load\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_this_tree() -> None:
    assert check_imports.problems(ROOT) == []
    assert len(check_imports.imports(ROOT / "weightload")["weightload._load.iterator"]) > 10  # it does look


def test_nothing_is_wrong_in_a_tree_that_is_right(tree: Path) -> None:
    assert check_imports.problems(tree) == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("csrc/base/error.h", '#include "file/file.h"', "csrc/base/error.h:2: base may not include file"),
        ("csrc/file/file.cpp", '#  include "read/slot.h"', "csrc/file/file.cpp:3: file may not include read"),
        ("csrc/file/file.cpp", '#include "cellar/wine.h"', "csrc/file/file.cpp:3: file may not include cellar"),
        ("csrc/cellar/wine.h", "", "csrc/cellar/wine.h: no such room"),
        ("weightload/_base/paths.py", "from weightload._load.load import load", "may not import weightload._load.load"),
        ("weightload/_base/paths.py", "import weightload._group.one", "weightload/_base/paths.py:3: weightload._base"),
        ("weightload/_base/paths.py", "def f():\n    from weightload._load import load", "weightload/_base/paths.py:4"),
        ("weightload/_base/paths.py", "if TYPE_CHECKING:\n    from ..cli import main", "weightload/_base/paths.py:4"),
        (
            "weightload/_base/paths.py",
            "from weightload import __version__",
            "paths imports weightload",
        ),
        ("weightload/_base/paths.py", "from weightload import settings", "paths may not import weightload.settings"),
        (
            "weightload/settings.py",
            "from weightload._group import one",
            "may not import weightload._group.one",
        ),
        ("weightload/_group/one.py", "from .._load.load import load", "weightload._group.one may not import"),
        ("weightload/_group/one.py", "from . import two", "weightload._group.one imports weightload._group"),
        ("weightload/_cellar/wine.py", "", "weightload._cellar.wine: no such room"),
    ],
)
def test_what_is_planted_is_found(tree: Path, file: str, line: str, said: str) -> None:
    path = tree / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    run = subprocess.run([sys.executable, check_imports.__file__, str(tree)], capture_output=True, text=True)
    assert run.returncode == 1
    assert said in run.stderr
    assert all(line.startswith(("csrc/", "weightload", "a cycle: ")) for line in run.stderr.splitlines())


@pytest.mark.parametrize("folder", ["benchmarks", "benchmarks/harness", "tests", "tests/support/ranks"])
def test_a_folder_of_scripts_or_tests_is_full(tree: Path, folder: str) -> None:
    (tree / folder).mkdir(parents=True)
    for name in ("__init__.py", *(f"module_{number}.py" for number in range(12))):
        (tree / folder / name).write_text("")
    assert check_imports.problems(tree) == []
    (tree / folder / "test_more.py").write_text("")
    assert check_imports.problems(tree) == [f"{folder}: 13 modules, 12 are enough"]


def test_a_room_is_full(tree: Path) -> None:
    for number in range(12):
        (tree / f"weightload/_base/module_{number}.py").write_text("")
    assert check_imports.problems(tree) == ["weightload/_base: 13 modules, 12 are enough"]
