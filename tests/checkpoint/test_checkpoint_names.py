"""resolve_safetensors_files: which of a directory's names are the model, and what is told of the others."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from test_checkpoint import names, put, put_index

import weightload
from weightload._checkpoint.file_names import family, shard_of, split_variant, what_it_is

INDEX = "model.safetensors.index.json"
PAIR = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

# Files of a directory (an index takes the names behind a colon), the variant, what is loaded, and what is told.
# A name without ending is a safetensors file.
WHOLE: dict[str, tuple[list[str], str | None, list[str], list[str]]] = {
    "letters within a word: lora": (["exploration"], None, ["exploration"], []),
    "letters within words": (["flora-v2", "kaloratron"], None, ["flora-v2", "kaloratron"], []),
    "a model called after what it does": (["prompt-optimizer-7b"], None, ["prompt-optimizer-7b"], []),
    "an upscaler": (["4x-upscaler", "rescheduler"], None, ["4x-upscaler", "rescheduler"], []),
    "consolidated in another word": (["unconsolidated"], None, ["unconsolidated"], []),
    "an adapter merged into a model": (["llama-lora-merged"], None, ["llama-lora-merged"], []),
    "ip-adapter is a model of its own": (["ip-adapter_sd15"], None, ["ip-adapter_sd15"], []),
    "ema as the only one": (["net_ema"], None, ["net_ema"], []),
    "dots that are no variants": (["wan2.1", "wan2.2"], None, ["wan2.1", "wan2.2"], []),
    "a lora": (["model", "my_lora-v2"], None, ["model"], ["my_lora-v2.safetensors (an adapter)"]),
    "a lora beside a model of any name": (["net", "net-LoRA"], None, ["net"], ["net-LoRA.safetensors (an adapter)"]),
    "peft": (["net", "adapter_model"], None, ["net"], ["adapter_model"]),
    "peft by its config": (["net", "my-adapter", "config.json", "adapter_config.json"], None, ["net"], ["my-adapter"]),
    "mlx": (["net", "adapters", "0000100_adapters"], None, ["net"], ["adapters.saf", "0000100_ad"]),
    "a trainer's state": (
        ["net", "optimizer", "optimizer_state-00001-of-00001", "rng_state_0", "lr_scheduler", "grad_scaler"],
        None,
        ["net"],
        ["trainer's state"],
    ),
    "a trainer's state, by the name of another": (["unet", "unet_optimizer"], None, ["unet"], ["unet_optimizer"]),
    "an EMA copy": (["unet", "unet_ema"], None, ["unet"], ["unet_ema.safetensors (an EMA copy)"]),
    "mistral": ([f"{INDEX}:{PAIR[0]},{PAIR[1]}", "consolidated"], None, PAIR, ["consolidated copy"]),
    "mistral, older": ([*PAIR, "consolidated.00", "consolidated-00001-of-00002"], None, PAIR, ["consolidated.00"]),
    "a variant": (["model", "model.fp16"], None, ["model"], ["variant='fp16'"]),
    "the variant": (["model", "model.fp16"], "fp16", ["model.fp16"], []),
    "the variant, beside others": (["model", "model.fp16", "my-lora"], "fp16", ["model.fp16"], ["my-lora"]),
    "the variant, whatever its words": (["model", "model.lora"], "lora", ["model.lora"], []),
    "an empty variant is none": (["model", "model.fp16"], "", ["model"], ["fp16"]),
    "another file than the canonical": (["model", "vae"], None, ["model"], ["vae.safetensors"]),
    "the second canonical name": (["model", "pytorch_model"], None, ["model"], ["pytorch_model"]),
    "pytorch_model and others": (["pytorch_model", "x"], None, ["pytorch_model"], ["x.safetensors"]),
    "families without an index": (["layers-2", "layers-10", "embed"], None, ["embed", "layers-2", "layers-10"], []),
    "shards beside a whole file": (["model", *PAIR], None, ["model"], ["shards beside a whole file"]),
    "an index beside a whole file": ([f"{INDEX}:{PAIR[0]},{PAIR[1]}", "model"], None, PAIR, ["not in model.safeten"]),
    "two sets of shards, one in the index": (
        [f"{INDEX}:{PAIR[0]},{PAIR[1]}", "model-00001-of-00001"],
        None,
        PAIR,
        ["model-00001-of-00001"],
    ),
    "an index whose shards are gone": ([f"{INDEX}!{PAIR[0]},{PAIR[1]}", "model"], None, ["model"], ["shards are gone"]),
    "of a variant": (
        [f"model.safetensors.index.fp16.json!{PAIR[0]}", "model.fp16", "model"],
        "fp16",
        ["model.fp16"],
        ["shards are gone"],
    ),
    "an index of another variant": (
        [f"model.safetensors.index.fp16.json:{PAIR[0]},{PAIR[1]}", "model"],
        None,
        ["model"],
        ["shards beside a whole file"],
    ),
    "hidden files": (["model", ".model", "._model", "._x-00001-of-00002", f".{INDEX}"], None, ["model"], []),
    "a sidecar of an index": ([*PAIR, f"._{INDEX}"], None, PAIR, []),
    "a download on its way": (["model", "x.safetensors.incomplete"], None, ["model"], []),
    "another case": (["model", "x.SafeTensors"], None, ["model"], ["x.SafeTensors"]),
    "a directory": (["model", "x.safetensors/"], None, ["model"], []),
}  # fmt: skip

SPELLINGS = [
    "model-{:05d}-of-00002", "model_{:05d}-of-00002", "model-{}-of-2", "model_{}_of_2", "model.{:05d}-of-00002",
    "model.safetensors-{:05d}-of-00002", "diffusion_pytorch_model.safetensors-{:05d}-of-00002",
    "pytorch_model-{:05d}-of-00002", "diffusion_pytorch_model-{:05d}-of-00002", "net-{:05d}-of-00002",
    "{:05d}-of-00002", "weights.v1.5-{:05d}-of-00002",
]  # fmt: skip
OF_A_VARIANT = [
    "model.fp16-{:05d}-of-00002", "model-{:05d}-of-00002.fp16", "model.fp16.safetensors-{:05d}-of-00002",
    "diffusion_pytorch_model.fp16-{:05d}-of-00002", "net.fp16-{:05d}-of-00002",
]  # fmt: skip


def ended(name: str) -> str:
    known = re.search(r"\.(safetensors|json|incomplete|bin|gguf|ckpt|pt|SafeTensors)/?$", name)
    return name if known else f"{name}.safetensors"


def lay(folder: Path, *what: str) -> Path:
    """A directory as the tables write it; the shards of an index with ``!`` are not there."""
    for item in what:
        index, mark, shards = item.partition("!" if "!" in item else ":")
        if mark:
            put(folder, *([] if mark == "!" else shards.split(",")))
            put_index(folder, index, *shards.split(","))
        elif item.endswith("/"):
            (folder / item).mkdir(parents=True)
        elif ended(item).endswith((".json", ".incomplete", ".bin", ".gguf", ".ckpt", ".pt")) or item.startswith("."):
            folder.mkdir(exist_ok=True)
            (folder / ended(item)).write_bytes(b"\0\5\x16\7")
        else:
            put(folder, ended(item))
    return folder


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_loaded_and_what_is_told(tmp_path: Path, case: str) -> None:
    what, variant, expected, told = WHOLE[case]
    lay(tmp_path, *what)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = weightload.resolve_safetensors_files(tmp_path, variant=variant)
    assert names(found) == [ended(name) for name in expected]
    assert len(caught) == bool(told)
    for warning in caught:
        assert warning.category is weightload.PassedOverWarning
        assert warning.filename == __file__
        assert all(text in str(warning.message) for text in told), warning.message
        assert "\n" not in str(warning.message)
        for path in found[1:]:
            assert Path(path).name not in str(warning.message)


def test_nobody_is_told_to_load_what_is_gone(tmp_path: Path) -> None:
    lay(tmp_path, f"{INDEX}!{PAIR[0]},{PAIR[1]}", "model")
    with pytest.warns(weightload.PassedOverWarning, match=r"\(its shards are gone\)$"):
        weightload.resolve_safetensors_files(tmp_path)
    lay(tmp_path, "model.fp16")
    with pytest.warns(weightload.PassedOverWarning, match="pass the variant or the path of the file itself$"):
        weightload.resolve_safetensors_files(tmp_path)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_shards(tmp_path: Path, spelling: str) -> None:
    both = [
        ended(spelling.format(number)) + ".safetensors" * spelling.startswith("model.safetensors") for number in (1, 2)
    ]
    both = [re.sub(r"(\.safetensors)+$", "", name) + ".safetensors" for name in both]
    put(tmp_path, *both)
    assert names(weightload.resolve_safetensors_files(tmp_path)) == both
    (tmp_path / both[1]).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(both[1])):
        weightload.resolve_safetensors_files(tmp_path)


@pytest.mark.parametrize("spelling", OF_A_VARIANT)
def test_spellings_of_shards_of_a_variant(tmp_path: Path, spelling: str) -> None:
    both = [f"{spelling.format(number)}.safetensors" for number in (1, 2)]
    put(tmp_path, *both)
    assert names(weightload.resolve_safetensors_files(tmp_path, variant="fp16")) == both
    if "net" not in spelling:
        with pytest.raises(FileNotFoundError, match="variant='fp16'"):
            weightload.resolve_safetensors_files(tmp_path)
    (tmp_path / both[0]).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(both[0])):
        weightload.resolve_safetensors_files(tmp_path, variant="fp16")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ([f"{INDEX}:{PAIR[0]}", "net-00001-of-00002"], ""),
        (["net-00001-of-00003", "net-00003-of-00003"], "net-00002-of-00003"),
        (["net_0-of-2"], "net_1-of-2"),
        ([*PAIR, "model-00001-of-00001"], "several sets of shards"),
        (["model", "diffusion_pytorch_model"], "more than one model"),
        (["x.fp16", "x.bf16"], "variant="),
    ],
)
def test_what_cannot_be_decided(tmp_path: Path, what: list[str], words: str) -> None:
    lay(tmp_path, *what)
    if not words:
        with pytest.warns(weightload.PassedOverWarning, match="net-00001-of-00002"):
            weightload.resolve_safetensors_files(tmp_path)
    else:
        with pytest.raises((FileNotFoundError, weightload.WeightLoadError), match=words):
            weightload.resolve_safetensors_files(tmp_path)


def test_an_index_with_some_of_its_shards(tmp_path: Path) -> None:
    lay(tmp_path, f"{INDEX}!{PAIR[0]},{PAIR[1]}", "model", PAIR[0])
    with pytest.raises(FileNotFoundError, match=rf"Shard missing \(1 of 2.*model\.safetensors instead.*{PAIR[1]}"):
        weightload.resolve_safetensors_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="Shard missing"):
        weightload.resolve_safetensors_files(tmp_path / INDEX)


@pytest.mark.parametrize(("name", "parts"), [
    ("model", None), ("a-3", None), ("a-3-of", None), ("a-of-3", None), ("prof-1", None), ("1of2", None),
    ("a-00002-of-00010", (2, 10, "a-00007-of-00010.safetensors")),
    ("a-9-of-10.fp16", (9, 10, "a-7-of-10.fp16.safetensors")),
    ("a{}-1-of-2", (1, 2, "a{}-7-of-2.safetensors")), ("a\n-1-of-2", (1, 2, "a\n-7-of-2.safetensors")),
])  # fmt: skip
def test_numbers_of_shards(name: str, parts: tuple[int, int, str] | None) -> None:
    shard = shard_of(f"{name}.safetensors")
    assert (None if shard is None else (shard.number, shard.total, shard.name(7))) == parts


@pytest.mark.parametrize(("stem", "variant", "others", "expected"), [
    ("model", None, [], ("model", None)), ("model.fp16", None, [], ("model", "fp16")),
    ("v1.5", None, [], ("v1.5", None)),
    ("v1.5", None, ["v1"], ("v1", "5")), ("v1.5", "5", [], ("v1", "5")), ("x.fp16", None, [], ("x.fp16", None)),
    ("x.fp16", None, ["x.bf16"], ("x", "fp16")), ("x.1", None, ["x.2"], ("x.1", None)),
    ("x.fp16", None, ["xy.fp8"], ("x.fp16", None)), ("model.non_ema", None, [], ("model", "non_ema")),
])  # fmt: skip
def test_variants_by_their_neighbours(
    stem: str, variant: str | None, others: list[str], expected: tuple[str, str | None]
) -> None:
    assert split_variant(family(stem), variant, {stem, *others}) == expected


def test_names_of_nothing_but_signs() -> None:
    for stem in ("", "_", "...", "½", "\udcff"):
        assert what_it_is(stem, ["", stem], False, False) is None
