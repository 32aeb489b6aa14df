"""SETTINGS.md, and what `weightload settings` prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from weightload import cli, settings, settings_page

PAGE = Path(settings.__file__).parent / "SETTINGS.md"


def test_the_page_is_the_one_that_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    """If not: weightload settings --markdown > weightload/SETTINGS.md."""
    assert cli.main(["settings", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text()


def test_every_setting_is_explained() -> None:
    page = PAGE.read_text()
    for field in dataclasses.fields(settings.Settings):
        about = field.metadata
        assert all(about[key] for key in ("unit", "loads", "what", "change")), field.name
        (row,) = [line for line in page.splitlines() if line.startswith(f"| [`{field.name}`]")]
        assert f"`WEIGHTLOAD_{field.name.upper()}`" in row
        assert about["unit"] in row
        section = page.split(f"\n## {field.name}\n")[1].split("\n## ")[0]
        assert " ".join(about["what"].split()) in " ".join(section.split())
        assert "*When to change it*" in section
    assert "settings.override(" in page


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
    assert settings_page.in_force()["spare_bytes"]["value"] == 0
    assert cli.main(["settings"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spare_bytes")]
    assert "0 bytes" in row
    assert row.endswith("WEIGHTLOAD_SPARE_BYTES")
    section = PAGE.read_text().split("\n## spare_bytes\n")[1].split("\n## ")[0]
    assert "0 keeps none." in section
    assert "At least" not in section


def test_a_value_that_is_not_allowed_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "many")
    assert cli.main(["settings"]) == 2
    assert "WEIGHTLOAD_THREADS='many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("window_bytes", 256 << 20, "256 MiB"), ("task_bytes", 65536, "64 KiB"), ("task_bytes", 5000, "5000 bytes"),
     ("threads", 0, "0 (the CPUs of the process)"), ("threads", 4, "4"), ("read", "auto", "auto")],
)  # fmt: skip
def test_values_in_words(name: str, value: int | str, words: str) -> None:
    assert settings_page.shown(name, value) == words
