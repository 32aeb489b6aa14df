"""Errors as people and programs meet them: on one line, made anew in another process, and with a way out."""

from __future__ import annotations

import gc
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entry, file_bytes
from safetensors import SafetensorError
from safetensors.torch import save_file

import weightload
from weightload import errors
from weightload.cli import main as cli

HOSTILE = "\x1b[31mred\nFAKE: all is well\x9b2J\u202egnp.\u2028\u2066"


def _drain(*arguments: Any, **options: Any) -> None:
    for _ in weightload.safetensors_weights_iterator(*arguments, to_cpu=True, **options):
        pass


def _two_files(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for path in files:
        save_file({HOSTILE: torch.zeros(3)}, path)
    return files


def _get(path: Path, name: str) -> torch.Tensor:
    with weightload.safe_open(path) as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


WAYS: dict[str, Callable[[Path], object]] = {
    "unexpected": lambda folder: weightload.load_into(torch.nn.Linear(3, 2), _two_files(folder)[0]),
    "of another size": lambda folder: weightload.load_into({HOSTILE: torch.zeros(4)}, _two_files(folder)[0]),
    "of load_model": lambda folder: weightload.load_model(torch.nn.Linear(3, 2), _two_files(folder)[0]),
    "twice": lambda folder: _drain(_two_files(folder)),
    "twice, into": lambda folder: weightload.load_into({HOSTILE: torch.zeros(3)}, _two_files(folder)),
    "twice, of a directory": lambda folder: weightload.resolve_safetensors_files(_two_files(folder)[0].parent),
    "missing from a handle": lambda folder: _get(_two_files(folder)[0], HOSTILE + "x"),
}


@pytest.mark.parametrize("way", WAYS)
def test_names_of_a_file_neither_break_a_line_nor_steer_a_terminal(tmp_path: Path, way: str) -> None:
    with pytest.raises((weightload.WeightLoadError, SafetensorError), match="FAKE") as caught:
        WAYS[way](tmp_path)
    text = str(caught.value)
    del caught
    gc.collect()  # exceptions hold frames, and these files
    assert not set(HOSTILE.replace("\n", "")).difference(filter(str.isprintable, HOSTILE)) & set(text)
    assert "\nFAKE" not in text


def test_a_missing_path_neither() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        weightload.load_file(f"/nowhere/{HOSTILE}")
    assert str(caught.value).isprintable()


def test_a_dtype_without_torch_and_a_hostile_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({HOSTILE: entry("F6_E2M3", [4], 0, 3)}, b"123"))
    with pytest.raises(errors.TensorError, match="F6_E2M3") as caught:
        weightload.load_into({HOSTILE: torch.zeros(4)}, path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [name for name, kind in vars(errors).items() if inspect.isclass(kind)])
def test_an_error_made_anew_of_its_text_can_be_shown(name: str) -> None:
    """An error that is made anew of another's text can be shown. torch's DataLoader does that with a worker's error."""
    kind = getattr(errors, name)
    if issubclass(kind, Exception):
        assert "what the worker said" in str(kind("what the worker said"))


class Missing(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return weightload.load_file("/nowhere/a.safetensors")


def test_a_missing_file_in_a_data_loader() -> None:
    loader = torch.utils.data.DataLoader(Missing(), batch_size=None, num_workers=1)
    with pytest.raises(FileNotFoundError) as caught:
        next(iter(loader))
    assert "/nowhere/a.safetensors" in str(caught.value)


def test_an_open_file_is_no_path(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with path.open("rb") as file, pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike"):
        _drain(file)
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike"):
        _drain(io.StringIO("a\nb\n"))
    with pytest.raises(ValueError, match="null byte") as caught:
        weightload.load_file(b"\0" * 1000)
    assert len(str(caught.value)) < 300


def test_what_names_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(errors.NotARegularFile, match="resolve_safetensors_files"):
        weightload.load_file(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(errors.HeaderTooLarge, match="resolve_safetensors_files"):
        weightload.load_file(index)
    with pytest.raises(ValueError, match="meta: its tensors have no bytes"):
        weightload.load_file(index, device="meta")


def test_a_derived_handle_gives_torch_tensors_only(tmp_path: Path) -> None:
    class Derived(weightload.safe_open):
        pass

    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    assert Derived(path, "pt").keys() == ["a"]
    for framework in ("np", "bogus"):
        with pytest.raises(ValueError, match=framework):
            Derived(path, framework=framework)


def test_the_command_line_minds_settings_at_once(
    real_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "abc")
    for command in ("inspect", "verify", "load", "settings"):
        assert cli.main([command, *([str(real_checkpoint)] if command != "settings" else [])]) == 2
        assert "WEIGHTLOAD_THREADS='abc'" in capsys.readouterr().err
