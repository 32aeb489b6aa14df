"""The check of includes and imports: nothing is wrong here, and what is planted is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import check_imports
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small source tree with nothing wrong in it."""
    files = {
        "csrc/base/error.h": "#include <string>\n",
        "csrc/io/file.cpp": '#include "base/error.h"\n#include "io/file.h"\n',
        "weightload/__init__.py": "from weightload.load import load\n",
        "weightload/_C.pyi": "",
        "weightload/load.py": "from weightload import _C, paths\nfrom weightload.inner import one\n",
        "weightload/paths.py": "import os\nfrom weightload import _C\n",
        "weightload/inner/__init__.py": "from . import one\n",
        "weightload/inner/one.py": "from ..paths import as_text\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_this_tree() -> None:
    assert check_imports.problems(ROOT) == []
    assert len(check_imports.imports(ROOT / "weightload")["weightload.iterator"]) > 10  # it does look


def test_nothing_is_wrong_in_a_tree_that_is_right(tree: Path) -> None:
    assert check_imports.problems(tree) == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("csrc/base/error.h", '#include "io/file.h"', "csrc/base/error.h:2: base may not include io"),
        ("csrc/io/file.cpp", '#  include "memory/slot.h"', "csrc/io/file.cpp:3: io may not include memory"),
        ("csrc/io/file.cpp", '#include "cellar/wine.h"', "csrc/io/file.cpp:3: io may not include cellar"),
        ("csrc/cellar/wine.h", "", "csrc/cellar/wine.h: no such room"),
        ("weightload/paths.py", "from weightload.load import load", "weightload.paths imports weightload.load"),
        ("weightload/paths.py", "import weightload.load", "weightload/paths.py:3: weightload.paths imports"),
        ("weightload/paths.py", "def f():\n    from weightload import load", "weightload/paths.py:4"),
        ("weightload/paths.py", "if TYPE_CHECKING:\n    from weightload.load import load", "weightload/paths.py:4"),
        ("weightload/paths.py", "from weightload import __version__", "weightload.paths imports weightload"),
        ("weightload/paths.py", "from .inner import one", "weightload.paths imports weightload.inner.one"),
        ("weightload/inner/one.py", "from ..load import load", "weightload.inner.one imports weightload.load"),
        ("weightload/inner/one.py", "from . import two", "weightload.inner.one imports weightload.inner"),
    ],
)
def test_what_is_planted_is_found(tree: Path, file: str, line: str, said: str) -> None:
    path = tree / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    run = subprocess.run([sys.executable, check_imports.__file__, str(tree)], capture_output=True, text=True)
    assert run.returncode == 1
    assert said in run.stderr
    assert all(line.startswith(("csrc/", "a cycle: ")) for line in run.stderr.splitlines())
