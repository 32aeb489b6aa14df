"""What there is to say of the settings: the page SETTINGS.md, and the values in force in this process."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from weightload import settings

KIB, MIB = 1 << 10, 1 << 20

HEAD = """\
# Settings

Made from `weightload/settings.py` by `weightload settings --markdown`. The defaults are meant to be right.

A setting is taken from the innermost scoped override, else from its environment variable, else it has its default.
It is read when a load begins, so a change concerns the loads that begin after it. A value that is not allowed is a
`ValueError` of every load that goes by settings; `load_file` of a small file, opening a handle and its single tensors
do not. `weightload settings` prints the values in force and where each comes from.

```python
from weightload import safetensors_weights_iterator, settings

with settings.override(threads=8, window_bytes=1 << 30):  # for loads begun in this block, in this thread or task
    weights = safetensors_weights_iterator(files)  # keeps them to its end
```

```
WEIGHTLOAD_THREADS=8 WEIGHTLOAD_WINDOW_BYTES=1073741824 python serve.py
```

"Loads" says which loads a setting is for: to the CPU, to accelerators. In variables, bytes are plain numbers.
"""

TAIL = """\
## What is no setting

- What a load does is said in its call: `device`, `strategy`, `group`, `names`, `backend`, `show_progress`. How long
  ranks wait for each other is the timeout of their `torch.distributed` group.
- `safe_open(...).prefetch(threads=...)` takes its own number of threads, and keeps all of its plan in its window.
- Limits that hostile files meet (the size of a header or an index, the number of reads of a plan) are fixed.
- Where a single tensor is large enough for threads (`safe_open`), and which ways of reading `"auto"` tries how often,
  are constants in the code with their reasons beside them.
"""


def shown(name: str, value: int | str) -> str:
    """A value as people read it: bytes in MiB where that is a whole number, ``threads=0`` in words."""
    if isinstance(value, str):
        return value
    if name == "threads":
        return str(value) if value else "0 (the CPUs of the process)"
    for unit, size in (("MiB", MIB), ("KiB", KIB)):
        if value and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value} bytes"


def markdown() -> str:
    """The page SETTINGS.md."""
    lines = [HEAD, "| setting | unit | default | environment variable | loads |", "| --- | --- | --- | --- | --- |"]
    fields = dataclasses.fields(settings.Settings)
    for field in fields:
        unit, loads = field.metadata["unit"], field.metadata["loads"]
        link = f"[`{field.name}`](#{field.name})"
        default = shown(field.name, field.default)  # type: ignore[arg-type]
        lines.append(f"| {link} | {unit} | {default} | `{settings.variable(field.name)}` | {loads} |")
    for field in fields:
        about = field.metadata
        lines += ["", f"## {field.name}", "", _wrapped(f"{about['what']}{_limits(field)}")]
        lines += ["", _wrapped(f"*When to change it*: {about['change']}")]
    return "\n".join([*lines, "", TAIL])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _limits(field: dataclasses.Field[Any]) -> str:
    least, multiple = field.metadata["least"], field.metadata["multiple"]
    if isinstance(field.default, str) or not least:
        return ""
    return f" A multiple of {multiple}." if multiple > 1 else f" At least {least}."


def in_force() -> dict[str, dict[str, Any]]:
    """Of each setting: its value in this process now, where that comes from, unit, default and variable.

    ``threads`` has the number that a load would start, too.

    Raises:
        ValueError: a value that is not allowed.
    """
    now, origins = settings.current(), settings.origins()
    found: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(now):
        found[field.name] = {
            "value": getattr(now, field.name),
            "from": origins[field.name],
            "default": field.default,
            "unit": field.metadata["unit"],
            "variable": settings.variable(field.name),
            "loads": field.metadata["loads"],
        }
    found["threads"]["here"] = now.thread_count()
    return found


def in_words() -> list[str]:
    """``in_force`` as lines of a table."""
    rows = []
    for name, about in in_force().items():
        value = f"0 ({about['here']} here)" if (name, about["value"]) == ("threads", 0) else shown(name, about["value"])
        origin = about["variable"] if about["from"] == "environment" else about["from"]
        rows.append((name, value, about["loads"], origin))
    rows.insert(0, ("setting", "value", "loads", "from"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
