"""resolve_safetensors_files: what belongs to a checkpoint, in which order, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import write_tensors

import weightload
from weightload import errors
from weightload._checkpoint.resolve import natural_key


def put(folder: Path, *names: str) -> Path:
    """Files with one tensor each, named after the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_tensors(folder / name, [(f"{name}.weight", "U8", [1])])
    return folder


def put_index(folder: Path, name: str, *shards: str, weight_map: dict[str, str] | None = None) -> Path:
    content = weight_map if weight_map is not None else {f"{shard}.weight": shard for shard in shards}
    path = folder / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": content}))
    return path


def names(files: list[str]) -> list[str]:
    return [Path(file).name for file in files]


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_file(tmp_path: Path) -> None:
    put(tmp_path, "any name.safetensors")
    path = tmp_path / "any name.safetensors"
    assert weightload.resolve_safetensors_files(path) == [str(path)]
    assert weightload.resolve_safetensors_files(str(path)) == [str(path)]


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    put(tmp_path, "b.safetensors", "a.safetensors")
    given = [tmp_path / "b.safetensors", str(tmp_path / "a.safetensors")]
    assert weightload.resolve_safetensors_files(given) == [str(item) for item in given]
    with pytest.raises(ValueError, match="directory"):
        weightload.resolve_safetensors_files(given, subfolder="x")


def test_an_index(tmp_path: Path) -> None:
    put(tmp_path, *SHARDS, "model-extra.safetensors")
    index = put_index(tmp_path, "model.safetensors.index.json", *reversed(SHARDS))
    assert names(weightload.resolve_safetensors_files(index)) == SHARDS
    assert names(weightload.resolve_safetensors_files(tmp_path)) == SHARDS


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model", "weights.v1.5", "transformer"])
def test_any_one_index(tmp_path: Path, stem: str) -> None:
    shards = [f"{stem}-00001-of-00001.safetensors"]
    put(tmp_path, *shards, "other.safetensors")
    put_index(tmp_path, f"{stem}.safetensors.index.json", *shards)
    assert names(weightload.resolve_safetensors_files(tmp_path)) == shards


def test_a_subfolder(tmp_path: Path) -> None:
    put(tmp_path / "transformer", "diffusion_pytorch_model.safetensors")
    put(tmp_path / "vae", "diffusion_pytorch_model.safetensors")
    found = weightload.resolve_safetensors_files(tmp_path, subfolder="transformer")
    assert found == [str(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")]
    with pytest.raises(FileNotFoundError):
        weightload.resolve_safetensors_files(tmp_path, subfolder="unet")
    with pytest.raises(FileNotFoundError, match="No safetensors"):
        weightload.resolve_safetensors_files(tmp_path)
    for outside in ("../" + tmp_path.name, "transformer/../../x", "..", str(tmp_path)):
        with pytest.raises(ValueError, match="must be a folder below the directory"):
            weightload.resolve_safetensors_files(tmp_path, subfolder=outside)


def test_natural_order(tmp_path: Path) -> None:
    put(tmp_path, *[f"part-{i}.safetensors" for i in (10, 9, 1, 2, 100)])
    assert names(weightload.resolve_safetensors_files(tmp_path)) == [
        f"part-{i}.safetensors" for i in (1, 2, 9, 10, 100)
    ]
    assert sorted(["a10", "a9", "b", "a", "10", "9"], key=natural_key) == ["9", "10", "a", "a9", "a10", "b"]


@pytest.mark.parametrize("indexed", [True, False])
def test_extras_are_not_swept_in(tmp_path: Path, indexed: bool) -> None:
    extras = [
        "consolidated.safetensors",
        "consolidated-00001-of-00001.safetensors",
        "adapter_model.safetensors",
    ]
    extras += ["pytorch_lora_weights.safetensors", "my-LoRA.safetensors", "optimizer.safetensors"]
    put(tmp_path, *SHARDS, *extras)
    put(tmp_path / "nested", "model.safetensors")
    if indexed:
        put_index(tmp_path, "model.safetensors.index.json", *SHARDS)
    assert names(weightload.resolve_safetensors_files(tmp_path)) == SHARDS


def test_extras_alone_are_no_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError):
        weightload.resolve_safetensors_files(tmp_path)
    assert len(weightload.resolve_safetensors_files(tmp_path / "adapter_model.safetensors")) == 1


def test_the_canonical_name_wins_over_other_files(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "extra.safetensors")
    assert names(weightload.resolve_safetensors_files(tmp_path)) == ["model.safetensors"]


def test_variants(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "model.fp16.safetensors", "model.bf16-00001-of-00001.safetensors")
    assert names(weightload.resolve_safetensors_files(tmp_path)) == ["model.safetensors"]
    assert names(weightload.resolve_safetensors_files(tmp_path, variant="fp16")) == ["model.fp16.safetensors"]
    found = weightload.resolve_safetensors_files(tmp_path, variant="bf16")
    assert names(found) == ["model.bf16-00001-of-00001.safetensors"]
    with pytest.raises(FileNotFoundError, match="fp8"):
        weightload.resolve_safetensors_files(tmp_path, variant="fp8")


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
def test_variants_of_an_index(tmp_path: Path, index: str) -> None:
    plain = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    put(tmp_path, *plain, *half)
    put_index(tmp_path, "diffusion_pytorch_model.safetensors.index.json", *plain)
    put_index(tmp_path, index, *half)
    assert names(weightload.resolve_safetensors_files(tmp_path)) == plain
    assert names(weightload.resolve_safetensors_files(tmp_path, variant="fp16")) == half


def test_dots_in_names_are_no_variants(tmp_path: Path) -> None:
    put(tmp_path, "wan2.1.safetensors")
    assert names(weightload.resolve_safetensors_files(tmp_path)) == ["wan2.1.safetensors"]


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    put(tmp_path, SHARDS[0])
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        weightload.resolve_safetensors_files(tmp_path)
    put_index(tmp_path, "model.safetensors.index.json", *SHARDS)
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        weightload.resolve_safetensors_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors", "", "..", "x\0.safetensors",
     "link/outside.safetensors", "pytorch_model.bin"],
)  # fmt: skip
def test_an_index_that_names_files_outside_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    index = put_index(folder, "model.safetensors.index.json", weight_map={"a": name})
    with pytest.raises(errors.CheckpointError, match=str(index)):
        weightload.resolve_safetensors_files(folder)


def test_links_of_a_hub_cache_are_fine(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, shard in enumerate(SHARDS):
        write_tensors(blobs / f"blob{number}", [(f"{shard}.weight", "U8", [1])])
        (snapshot / shard).symlink_to(f"../../blobs/blob{number}")
    put_index(blobs, "index-blob", *SHARDS)
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/index-blob")
    found = weightload.resolve_safetensors_files(snapshot)
    assert found == [str(snapshot / shard) for shard in SHARDS]
    (blobs / "blob1").unlink()
    with pytest.raises(FileNotFoundError):
        weightload.resolve_safetensors_files(snapshot)


def test_a_shard_in_a_folder_below_the_index_is_fine(tmp_path: Path) -> None:
    put(tmp_path / "parts", "a.safetensors")
    index = put_index(
        tmp_path, "model.safetensors.index.json", weight_map={"a.safetensors.weight": "parts/a.safetensors"}
    )
    assert weightload.resolve_safetensors_files(index) == [str(tmp_path / "parts" / "a.safetensors")]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path, indexed: bool) -> None:
    for shard in SHARDS:
        write_tensors(tmp_path / shard, [("same", "U8", [1]), (f"{shard}.weight", "U8", [1])])
    if indexed:
        put_index(tmp_path, "model.safetensors.index.json", *SHARDS)
    with pytest.raises(errors.DuplicateTensor) as caught:
        weightload.resolve_safetensors_files(tmp_path)
    assert caught.value.tensor == "same"


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path) -> None:
    put(tmp_path, *SHARDS)
    swapped = {f"{SHARDS[0]}.weight": SHARDS[1], f"{SHARDS[1]}.weight": SHARDS[0]}
    put_index(tmp_path, "model.safetensors.index.json", weight_map=swapped)
    with pytest.raises(errors.CheckpointError, match="not in this shard"):
        weightload.resolve_safetensors_files(tmp_path)
    put_index(tmp_path, "model.safetensors.index.json", weight_map={"absent": SHARDS[0]})
    with pytest.raises(errors.CheckpointError, match="no shard has it"):
        weightload.resolve_safetensors_files(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
     '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "[" * 100_000, b"\xff\xfe"],
)  # fmt: skip
def test_a_malformed_index_is_refused(tmp_path: Path, content: str | bytes) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(errors.CheckpointError) as caught:
        weightload.resolve_safetensors_files(tmp_path)
    assert caught.value.filename == str(index)


def test_several_models_in_one_directory_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "diffusion_pytorch_model.safetensors")
    with pytest.raises(errors.CheckpointError, match="more than one"):
        weightload.resolve_safetensors_files(tmp_path)


def test_several_indexes_prefer_the_canonical_one(tmp_path: Path) -> None:
    put(tmp_path, *SHARDS, "x-1.safetensors", "y-1.safetensors")
    put_index(tmp_path, "x.safetensors.index.json", "x-1.safetensors")
    put_index(tmp_path, "y.safetensors.index.json", "y-1.safetensors")
    with pytest.raises(errors.CheckpointError, match="more than one"):
        weightload.resolve_safetensors_files(tmp_path)
    put_index(tmp_path, "model.safetensors.index.json", *SHARDS)
    assert names(weightload.resolve_safetensors_files(tmp_path)) == SHARDS


def test_what_is_not_there(tmp_path: Path) -> None:
    for path in ("none", "none.safetensors", "none.safetensors.index.json"):
        with pytest.raises(FileNotFoundError):
            weightload.resolve_safetensors_files(tmp_path / path)
    with pytest.raises(FileNotFoundError):
        weightload.resolve_safetensors_files(tmp_path)
    with pytest.raises(FileNotFoundError):
        weightload.resolve_safetensors_files("some-org/some-model")


def test_two_formats_of_one_model_without_an_index(tmp_path: Path) -> None:
    """A whole file beside stale shards of a re-save: the whole file is the model."""
    put(tmp_path, "model.safetensors", *SHARDS)
    assert names(weightload.resolve_safetensors_files(tmp_path)) == ["model.safetensors"]


def test_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "m", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert weightload.resolve_safetensors_files("m") == [os.path.join("m", "model.safetensors")]
