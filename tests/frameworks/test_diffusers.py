"""diffusers: a Wan transformer, in one file and in several, loaded one after the other and at once."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import evict
from counting import Counted, counted_loads, files_of, require, same  # noqa: F401
from safetensors.torch import load_file, save_file

require("diffusers")

from diffusers import AutoencoderKL, WanTransformer3DModel  # noqa: E402

from weightload.integrations import diffusers as integration  # noqa: E402


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=512, num_layers=6, rope_max_seq_len=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    wan().save_pretrained(folder, max_shard_size="3MB")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    wan().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.bfloat16}, {"disable_mmap": True}])
@pytest.mark.parametrize("which", ["whole", "sharded"])
def test_from_pretrained(request: pytest.FixtureRequest, counted: Counted, which: str, options: dict[str, Any]) -> None:
    folder = request.getfixturevalue(which)
    expected = WanTransformer3DModel.from_pretrained(folder, **options)
    calls = counted("diffusers")
    evict(files_of(folder))
    found = WanTransformer3DModel.from_pretrained(folder, **options)
    assert calls["load_file"] == len(files_of(folder))
    same(found, expected)


def test_parallel_loading(sharded: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers.models.modeling_utils as modeling

    expected = WanTransformer3DModel.from_pretrained(sharded)
    monkeypatch.setattr(modeling, "HF_ENABLE_PARALLEL_LOADING", True)
    calls = counted("diffusers")
    found = WanTransformer3DModel.from_pretrained(sharded)
    assert calls["load_file"] == len(files_of(sharded)) > 2
    same(found, expected)


def test_without_mappings_nothing_is_mapped(whole: Path, counted: Counted) -> None:
    calls = counted("diffusers")
    model = WanTransformer3DModel.from_pretrained(whole, disable_mmap=True)
    assert calls["load_file"] == 1
    assert str(files_of(whole)[0]) not in Path("/proc/self/maps").read_text()
    del model


@pytest.mark.simulated
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_an_accelerator(
    sharded: Path, counted: Counted, simulated: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: bool
) -> None:
    """Straight there, if nothing is cast; what is cast is cast before it takes memory there."""
    import diffusers.models.modeling_utils as modeling

    expected = WanTransformer3DModel.from_pretrained(sharded, torch_dtype=dtype)
    monkeypatch.setattr(modeling, "HF_ENABLE_PARALLEL_LOADING", at_once)
    straight: list[Path] = []
    calls = counted("diffusers")
    load_apart = integration.load_apart

    def watched(filename: Any, device: torch.device) -> Any:
        straight.append(filename)
        return load_apart(filename, device)

    monkeypatch.setattr(integration, "load_apart", watched)
    found = WanTransformer3DModel.from_pretrained(sharded, torch_dtype=dtype, device_map={"": "simulated:0"})
    count = len(files_of(sharded))
    assert (len(straight), calls.get("load_file", 0)) == ((count, 0) if dtype == torch.float32 else (0, count))
    for name, tensor in found.state_dict().items():
        assert tensor.device.type == "simulated"
        assert torch.equal(tensor.cpu(), expected.state_dict()[name])
        if tensor.nbytes > 4096:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.simulated
def test_an_accelerator_that_is_full(sharded: Path, counted: Counted, simulated: Any) -> None:
    """A full accelerator raises what diffusers raises without weightload, and not that the file cannot be read."""
    counted("diffusers")
    simulated.limit_device_memory(4 << 20)
    with pytest.raises(torch.OutOfMemoryError):
        WanTransformer3DModel.from_pretrained(sharded, torch_dtype=torch.float32, device_map={"": "simulated:0"})


@pytest.mark.simulated
def test_what_the_model_lacks_takes_no_memory_of_the_accelerator(
    sharded: Path, counted: Counted, simulated: Any, tmp_path: Path
) -> None:
    shutil.copytree(sharded, tmp_path / "model")
    index_path = next((tmp_path / "model").glob("*.index.json"))
    index = json.loads(index_path.read_text())
    path = files_of(tmp_path / "model")[0]
    extra = {"extra.weight": torch.ones(1 << 20)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, path.name)
    index_path.write_text(json.dumps(index))
    counted("diffusers")
    model = WanTransformer3DModel.from_pretrained(
        tmp_path / "model", torch_dtype=torch.float32, device_map={"": "simulated:0"}
    )
    gc.collect()
    held = sum(-(-parameter.nbytes // 512) * 512 for parameter in model.parameters())
    assert simulated.live_bytes(0) <= 1.05 * held


def test_a_step(whole: Path, counted: Counted) -> None:
    def step() -> torch.Tensor:
        model = WanTransformer3DModel.from_pretrained(whole)
        torch.manual_seed(1)
        out: torch.Tensor = model(
            torch.randn(1, 16, 1, 8, 8), torch.tensor([3]), torch.randn(1, 4, 64), return_dict=False
        )[0]
        out.sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return out

    expected = step()
    calls = counted("diffusers")
    assert torch.equal(step(), expected)
    assert torch.equal(step(), expected)
    assert calls["load_file"] == 2


def test_another_model(tmp_path: Path, counted: Counted) -> None:
    AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": False}):
        expected = AutoencoderKL.from_pretrained(tmp_path, **options)
        calls = counted("diffusers")
        calls.clear()
        same(AutoencoderKL.from_pretrained(tmp_path, **options), expected)
        assert calls["load_file"] == 1
