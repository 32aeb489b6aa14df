"""resolve_safetensors_files: how what was passed over is told, and what errors say is there instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import write_tensors
from test_checkpoint import put, put_index
from test_checkpoint_names import INDEX, lay

import weightload
from weightload.cli import main as cli


@pytest.mark.parametrize(
    ("what", "variant", "words"),
    [
        (["diffusion_pytorch_model.fp16"], None, ["variant='fp16'", "pass the variant"]),
        (["model.ema"], None, ["variant='ema'"]),
        (["model.fp16"], "fp8", ["of variant 'fp8'", "variant='fp16'"]),
        (["model"], "fp8", ["model.safetensors (of no variant)"]),
        (["adapter_model"], None, ["adapter_model.safetensors (an adapter)", "path of the file itself"]),
        (["style", "adapter_config.json"], None, ["style.safetensors (an adapter)"]),
        (["pytorch_lora_weights"], None, ["pytorch_lora_weights.safetensors (an adapter)"]),
        (["learned_embeds"], None, ["textual inversion"]),
        (["consolidated"], None, ["consolidated.safetensors (a consolidated copy)"]),
        (["consolidated.safetensors.index.json!consolidated-00001-of-00002.safetensors"], None, ["pass its path"]),
        (["optimizer"], None, ["a trainer's state"]),
        (["pytorch_model.bin"], None, ["pytorch_model.bin (another format"]),
        (["model-q4.gguf", "a.ckpt", "b.pt"], None, ["model-q4.gguf", "a.ckpt", "b.pt"]),
        (["pytorch_model.bin.index.json"], None, ["pytorch_model.bin.index.json"]),
        (["._model"], None, ["._model.safetensors (a hidden file or a sidecar)"]),
        (["model.safetensors.incomplete"], None, ["model.safetensors.incomplete (a download that has not ended)"]),
        (["model.SafeTensors"], None, ["model.SafeTensors (ends in .SafeTensors"]),
        (["model.safetensors/"], None, ["model.safetensors (a directory"]),
        (["a\x1b[2J\nb.bin"], None, ["a\\x1b[2J\\nb.bin"]),
    ],
)
def test_what_is_there_instead(tmp_path: Path, what: list[str], variant: str | None, words: list[str]) -> None:
    lay(tmp_path, *what)
    with pytest.raises(FileNotFoundError, match="No safetensors files of a model") as caught:
        weightload.resolve_safetensors_files(tmp_path, variant=variant)
    assert caught.value.filename == str(tmp_path)
    assert all(text in caught.value.strerror for text in words), caught.value
    assert caught.value.strerror.isprintable()


@pytest.mark.parametrize("name", ["model.safetensors-00001-of-00002", "model-00001-of-00002", "model_1_of_2"])
def test_shards_without_an_ending_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=rf"there is {name} \(does not end in \.safetensors: rename it"):
        weightload.resolve_safetensors_files(tmp_path)


def test_an_error_about_a_full_directory_is_short(tmp_path: Path) -> None:
    lay(tmp_path, *(f"{i}{'x' * 200}.{ending}" for i in range(50) for ending in ("bin", "gguf", "pt")))
    for i in range(300):
        lay(tmp_path, f"model.v{i}x{'y' * 150}")
    with pytest.raises(FileNotFoundError) as caught:
        weightload.resolve_safetensors_files(tmp_path)
    assert len(str(caught.value)) < 3000
    assert "other files" in str(caught.value)


def test_a_pipeline(tmp_path: Path) -> None:
    put(tmp_path / "unet", "diffusion_pytorch_model.safetensors")
    put(tmp_path / "vae", "diffusion_pytorch_model.safetensors")
    (tmp_path / "scheduler").mkdir()
    with pytest.raises(FileNotFoundError, match=r"subfolder= \('unet', 'vae'\)"):
        weightload.resolve_safetensors_files(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No such folder; .*\('unet', 'vae'\).*transformer") as caught:
        weightload.resolve_safetensors_files(tmp_path, "transformer")
    assert caught.value.filename == str(tmp_path / "transformer")


@pytest.mark.parametrize("ref", ["0123", None, "../../..", "gone"])
def test_the_root_of_a_hub_cache(tmp_path: Path, ref: str | None) -> None:
    root = tmp_path / "models--org--name"
    put(root / "snapshots" / "0123", "model.safetensors")
    if ref is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(ref)
    with pytest.raises(FileNotFoundError, match=str(root / "snapshots" / "0123")):
        weightload.resolve_safetensors_files(root)
    (root / "snapshots" / "4567").mkdir()
    with pytest.raises(FileNotFoundError, match=r"snapshots/(0123|REVISION)"):
        weightload.resolve_safetensors_files(root)


def test_names_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="download it first"):
        weightload.resolve_safetensors_files("org/model-7B")
    for path in ("org/a.safetensors", "/org/model", "model"):
        with pytest.raises(FileNotFoundError) as caught:
            weightload.resolve_safetensors_files(path)
        assert "download" not in str(caught.value)


def test_a_warning_made_an_error_reaches_the_caller(tmp_path: Path) -> None:
    lay(tmp_path, "model", "model.fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error", weightload.PassedOverWarning)
        with pytest.raises(weightload.PassedOverWarning, match="fp16") as caught:
            weightload.resolve_safetensors_files(tmp_path)
        assert isinstance(caught.value, UserWarning)
        assert len(weightload.resolve_safetensors_files(tmp_path, variant="fp16")) == 1
        assert len(weightload.resolve_safetensors_files(tmp_path / "model.safetensors")) == 1


def test_a_warning_is_short_and_harmless(tmp_path: Path) -> None:
    lay(tmp_path, "model", *(f"{i}x\x1b[2J\n" for i in range(100)), *(f"x-{i:05d}-of-01000" for i in range(1000)))
    with pytest.warns(weightload.PassedOverWarning) as caught:
        weightload.resolve_safetensors_files(tmp_path)
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 1000
    assert str(caught[0].message).isprintable()


@pytest.mark.parametrize("command", ["inspect", "verify", "load"])
def test_the_command_tells_it_in_one_line(tmp_path: Path, command: str) -> None:
    lay(tmp_path, "model", "model.fp16")
    run = [sys.executable, "-W", "error", "-m", "weightload", command, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert line.startswith("weightload: ")
    assert "model.fp16.safetensors (variant='fp16')" in line
    assert "Warning" not in line


def test_the_commands_json_stays_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path, "model", "my-lora")
    assert cli.main(["inspect", "--json", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["tensor_count"] == 1
    assert "my-lora" in said.err


@pytest.mark.parametrize(
    "spellings",
    [["s", "./s"], ["./s", "s"], ["d//s", "d/s"], ["d/./s", "d/s", "./d/s"], ["s", "hard"], ["s", "link"],
     ["link", "s", "./hard"]],
)  # fmt: skip
def test_one_shard_by_several_names(tmp_path: Path, spellings: list[str]) -> None:
    (tmp_path / "d").mkdir()
    for folder in (tmp_path, tmp_path / "d"):
        shard = write_tensors(folder / "s.safetensors", [(f"t{n}", "U8", [1]) for n in range(len(spellings))])
        os.link(shard, folder / "hard.safetensors")
        (folder / "link.safetensors").symlink_to("s.safetensors")
    index = {f"t{n}": f"{name}.safetensors" for n, name in enumerate(spellings)}
    (found,) = weightload.resolve_safetensors_files(put_index(tmp_path, INDEX, weight_map=index))
    assert len(weightload.load_file(found)) == len(spellings)
