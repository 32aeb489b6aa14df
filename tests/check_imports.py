"""Checks that includes between the rooms of csrc/ run one way, and imports between those of weightload/, without a
cycle, and that no folder of the package, the benchmarks or the tests has more than a dozen modules.

python tests/check_imports.py [ROOT]    prints what is wrong, a line each, and exits with 1 if anything is
"""

from __future__ import annotations

import ast
import collections
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# A file may include what is in its own room and in those before it.
ROOMS = (
    "base", "threads", "format", "plan", "memory", "file", "page_cache", "read",
    "device", "checkpoint", "group", "load", "bindings",
)  # fmt: skip

# Nothing else outside of bindings includes torch, nor Python: the rest builds with g++ alone.
NEED_TORCH = ("device/accelerator.cpp", "device/plain_torch.cpp", "group/process_group.cpp")

# The rooms of the package, likewise. "" is its own modules but for ``__init__`` and ``__main__``, which may import
# everything.
PACKAGE_ROOMS = (
    "_base", "", "_remote", "_cache", "_parts", "_checkpoint", "_group", "_verify", "_load", "_into", "_api",
    "_install", "integrations", "cli",
)  # fmt: skip
MOST_MODULES = 12
# Their folders may import one another as they like, but are no larger.
SCRIPTS = ("benchmarks", "tests")

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"/]+)/', re.M)


def wrong_includes(csrc: Path) -> Iterator[str]:
    """Files in no known room, and includes of a room that comes later."""
    order = {room: number for number, room in enumerate(ROOMS)}
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp")):
        shown, room = path.relative_to(csrc.parent), path.relative_to(csrc).parts[0]
        if room not in order:
            yield f"{shown}: no such room in {Path(__file__).name}: {', '.join(ROOMS)}"
            continue
        text = path.read_text()
        for match in INCLUDE.finditer(text):
            if order.get(match[1], len(ROOMS)) > order[room]:
                line = text.count("\n", 0, match.start(1)) + 1
                yield f"{shown}:{line}: {room} may not include {match[1]}"


def imports(package: Path) -> dict[str, dict[str, str]]:
    """Map each module to the package's modules that it imports, and where. Imports in functions and for types count."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, dict[str, str]] = {}
    for name, path in names.items():
        found[name] = {}
        for node in ast.walk(ast.parse(path.read_text())):
            for imported in _imported(node, name, path.name == "__init__.py", set(names)):
                if imported != name:
                    found[name].setdefault(imported, f"{path.relative_to(package.parent)}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def _imported(node: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """The package's modules that a statement imports. A package's ``__init__`` is what gives names that are no module;
    the extension (``_C``) imports nothing."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    if isinstance(node, ast.ImportFrom):
        above = module.split(".")[: (None if is_package else -1)]
        base = ".".join([*above[: len(above) - node.level + 1], *(node.module or "").split(".")]).strip(".")
        base = base if node.level else node.module or ""
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            if inner in known or (base in known and alias.name != "_C"):
                yield inner if inner in known else base


def wrong_imports(graph: dict[str, dict[str, str]]) -> Iterator[str]:
    """Modules in no known room, imports of a room that comes later, and rooms that are full."""
    order = {room: number for number, room in enumerate(PACKAGE_ROOMS)}
    modules = [name for name in graph if name.count(".") > 0 and not name.endswith(".__main__")]
    rooms = {name: name.split(".")[1] if name.count(".") > 1 or name.split(".")[1] in order else "" for name in modules}
    for name in modules:
        if rooms[name] not in order:
            yield f"{name}: no such room in {Path(__file__).name}: {', '.join(PACKAGE_ROOMS)}"
            continue
        for imported, where in graph[name].items():
            if order.get(rooms.get(imported, ""), -1) > order[rooms[name]]:
                yield f"{where}: {name} may not import {imported}"
    for room, count in collections.Counter(rooms.values()).items():
        if count > MOST_MODULES:
            yield f"weightload/{room}: {count} modules, {MOST_MODULES} are enough"


def full_folders(root: Path) -> Iterator[str]:
    """Folders of scripts and tests that are full; ``__init__`` is none of a folder's modules."""
    modules = [path for name in SCRIPTS for path in sorted((root / name).rglob("*.py")) if path.name != "__init__.py"]
    for folder, count in collections.Counter(path.parent.relative_to(root) for path in modules).items():
        if count > MOST_MODULES:
            yield f"{folder}: {count} modules, {MOST_MODULES} are enough"


def cycles(graph: dict[str, dict[str, str]]) -> list[list[str]]:
    """A cycle for every module that reaches itself and is in none of the cycles before it; the shortest one."""
    found: list[list[str]] = []
    for start in graph:
        if any(start in cycle for cycle in found):
            continue
        came_from: dict[str, str] = {}
        queue = [start]
        for module in queue:
            for imported in graph.get(module, {}):
                if imported not in came_from:
                    came_from[imported] = module
                    queue.append(imported)
        if start in came_from:
            cycle = [came_from[start]]
            while cycle[-1] != start:
                cycle.append(came_from[cycle[-1]])
            found.append(cycle[::-1])
    return found


def problems(root: Path) -> list[str]:
    """Return the problems of a source tree, a line each."""
    graph = imports(root / "weightload")
    said = [*wrong_includes(root / "csrc"), *wrong_imports(graph), *full_folders(root)]
    for cycle in cycles(graph):
        steps = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
        said.append("a cycle: " + "; ".join(f"{graph[a][b]}: {a} imports {b}" for a, b in steps))
    return said


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent)
    sys.exit("\n".join(wrong) or None)
