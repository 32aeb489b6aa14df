"""SETTINGS.md, and what `weightload settings` prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from weightload import settings
from weightload.cli import main as cli
from weightload.cli import settings as cli_settings

PAGE = Path(settings.__file__).parent / "SETTINGS.md"


def test_the_table_is_of_the_settings_there_are() -> None:
    """Names, units, defaults, environment variables and loads, in the order of the fields."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| [`")]
    assert rows == [
        [
            f"[`{field.name}`](#{field.name})",
            field.metadata["unit"],
            cli_settings.shown(field.name, field.default),  # type: ignore[arg-type]
            f"`WEIGHTLOAD_{field.name.upper()}`",
            field.metadata["loads"],
        ]
        for field in dataclasses.fields(settings.Settings)
    ]
    assert [row[3].strip("`") for row in rows] == [settings.variable(name) for name in settings.NAMES]


def test_every_setting_has_a_section() -> None:
    sections = dict(section.split("\n", 1) for section in PAGE.read_text().split("\n## ")[1:])
    assert list(sections) == [*settings.NAMES, "What is no setting"]
    for name in settings.NAMES:
        assert "\n\n*" in sections[name], f"{name}: when to change it is missing"
    in_one_line = {name: " ".join(text.split()) for name, text in sections.items()}
    for name, said in (
        ("threads", f"at most {settings.MOST_DEFAULT_THREADS};"),
        ("threads", f"at least {settings.LEAST_COLD_THREADS}."),
        ("cached_pinned_bytes", f"a {settings.SLOTS_OF_CACHED}nd of it"),
    ):
        assert said in in_one_line[name]
    multiples = [name for name in settings.NAMES if "multiple of 4096" in in_one_line[name]]
    fields = dataclasses.fields(settings.Settings)
    assert multiples == [field.name for field in fields if field.metadata["multiple"] == 4096]
    least = {field.name: field.metadata["least"] for field in fields if field.metadata["unit"] == "bytes"}
    assert "Numbers of bytes are at least 4096; `spare_bytes` may be 0." in PAGE.read_text()
    assert least == {**dict.fromkeys(least, 4096), "spare_bytes": 0}


def test_the_page_s_links_and_example_hold() -> None:
    page = PAGE.read_text()
    example = page.split("```python\n")[1].split("```")[0]
    (arguments,) = [line.split("override(")[1].split(")")[0] for line in example.splitlines() if "override(" in line]
    with settings.override(**eval(f"dict({arguments})")):
        assert settings.current().threads == 8
    (variables,) = [line.split(" python ")[0] for line in page.splitlines() if line.startswith("WEIGHTLOAD_")]
    for pair in variables.split():
        assert pair.split("=")[0] in {settings.variable(name) for name in settings.NAMES}


def test_the_values_in_force(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WEIGHTLOAD_TASK_BYTES", "4194304")
    with settings.override(read="direct"):
        assert cli.main(["settings"]) == 0
        rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert cli.main(["settings", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert set(rows) == {"setting", *settings.NAMES}
    assert "4 MiB" in rows["task_bytes"]
    assert rows["task_bytes"].endswith("WEIGHTLOAD_TASK_BYTES")
    assert rows["read"].endswith("override")
    assert rows["slot_bytes"].endswith("default")
    assert f"0 ({settings.Settings().thread_count()} here)" in rows["threads"]
    assert (found["task_bytes"]["value"], found["task_bytes"]["from"]) == (4 << 20, "environment")
    assert found["task_bytes"]["default"] == 8 << 20
    assert found["task_bytes"]["unit"] == "bytes"
    assert found["threads"]["here"] == settings.Settings().thread_count()


def test_spare_memory_may_be_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WEIGHTLOAD_SPARE_BYTES", "0")
    assert cli_settings.in_force()["spare_bytes"]["value"] == 0
    assert cli.main(["settings"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spare_bytes")]
    assert "0 bytes" in row
    assert row.endswith("WEIGHTLOAD_SPARE_BYTES")


def test_a_value_that_is_not_allowed_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "many")
    assert cli.main(["settings"]) == 2
    assert "WEIGHTLOAD_THREADS='many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("window_bytes", 256 << 20, "256 MiB"), ("task_bytes", 65536, "64 KiB"), ("task_bytes", 5000, "5000 bytes"),
     ("threads", 0, "0 (the CPUs of the process)"), ("threads", 4, "4"),
     ("requests", 0, "0 (16 to 64, as many as pay)"), ("requests", 16, "16"), ("read", "auto", "auto")],
)  # fmt: skip
def test_values_in_words(name: str, value: int | str, words: str) -> None:
    assert cli_settings.shown(name, value) == words
