"""transformers: from_pretrained gives the same, and weightload has read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import evict
from counting import Counted, counted_loads, files_of, require, same  # noqa: F401
from safetensors import SafetensorError

require("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM  # noqa: E402

SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, max_shard_size="4MB", **options)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16)
    return saved(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    return saved(model, tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of their own in the files, which are merged when they are loaded."""
    config = MixtralConfig(**SMALL | {"num_hidden_layers": 2}, num_local_experts=4)
    return saved(MixtralForCausalLM(config), tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sharded(llama: Path, counted: Counted, dtype: torch.dtype, cold: bool) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    calls = counted("transformers")
    if cold:
        evict(files_of(llama))
    found = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    assert calls["safe_open"] >= len(files_of(llama)) > 2
    same(found, expected)


def test_tied(tied: Path, counted: Counted) -> None:
    expected = AutoModelForCausalLM.from_pretrained(tied)
    calls = counted("transformers")
    found = AutoModelForCausalLM.from_pretrained(tied)
    assert calls["safe_open"] >= 1
    same(found, expected)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_merged_experts(experts: Path, counted: Counted) -> None:
    expected = AutoModelForCausalLM.from_pretrained(experts)
    calls = counted("transformers")
    evict(files_of(experts))
    found = AutoModelForCausalLM.from_pretrained(experts)
    assert calls["safe_open"] >= len(files_of(experts))
    same(found, expected)


def test_offloaded_to_disk(llama: Path, counted: Counted, tmp_path: Path) -> None:
    """Layers that stay on disk are read when they are needed, by accelerate."""
    require("accelerate")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 6 else "disk" for i in range(12)}
    tokens = torch.arange(8).reshape(1, 8)
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(tokens).logits
    calls = counted("transformers", "accelerate")
    found = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offload"
    )
    before = calls["safe_open"]
    assert torch.equal(found(tokens).logits, expected)
    assert calls["safe_open"] >= before


def test_a_forward_and_a_step_of_training(llama: Path, counted: Counted) -> None:
    tokens = torch.arange(16).reshape(2, 8)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return loss, model.state_dict()

    expected_loss, expected = step()
    calls = counted("transformers")
    loss, found = step()
    assert calls["safe_open"] >= 1
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The file was not written to.
    assert torch.equal(step()[0], expected_loss)


def test_missing_and_unexpected_names_are_reported_as_ever(llama: Path, counted: Counted) -> None:
    def load() -> dict[str, Any]:
        config = LlamaConfig(**SMALL | {"num_hidden_layers": 14})
        _, info = LlamaForCausalLM.from_pretrained(llama, config=config, output_loading_info=True)
        return {key: sorted(map(str, value)) for key, value in info.items()}

    expected = load()
    counted("transformers")
    assert load() == expected


def test_a_file_that_is_cut_off(llama: Path, counted: Counted, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 1}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    counted("transformers")
    with pytest.raises(SafetensorError, match=r"model\.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_it_is_switched_off(llama: Path, counted: Counted) -> None:
    import weightload

    calls = counted("transformers")
    weightload.uninstall("transformers")
    AutoModelForCausalLM.from_pretrained(llama)
    assert calls == {}


@pytest.mark.simulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_an_accelerator(
    llama: Path, counted: Counted, simulated: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By way of page-locked memory and ahead of what is asked for, each tensor in memory of its own."""
    require("accelerate")
    from weightload._install import read_ahead

    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    came: list[tuple[str, str]] = []
    fetch, start = read_ahead.fetch, read_ahead.start_prefetch

    def one(reader: Any, number: int, device: torch.device, *others: Any) -> torch.Tensor:
        came.append((device.type, reader.file.names()[number]))
        return fetch(reader, number, device, *others)

    def many(reader: Any, plan: Any, device: torch.device, *others: Any, **options: Any) -> Any:
        came.extend((device.type, name) for name in plan)
        loads.append(len(plan))
        return start(reader, plan, device, *others, **options)

    loads: list[int] = []
    monkeypatch.setattr(read_ahead, "LEAST_FOR_PIPELINE", 4096)
    monkeypatch.setattr(read_ahead, "fetch", one)
    monkeypatch.setattr(read_ahead, "start_prefetch", many)
    calls = counted("transformers")
    found = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype, device_map={"": "simulated:0"})
    assert calls["safe_open"] >= 1
    assert {kind for kind, _ in came} == {"simulated"}
    assert sorted(name for _, name in came) == sorted(expected.state_dict())  # each once
    assert sum(loads) > len(came) / 2
    for name, tensor in found.state_dict().items():
        assert tensor.device.type == "simulated"
        assert torch.equal(tensor.cpu(), expected.state_dict()[name])
        if tensor.nbytes > 4096:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_no_more_is_read_than_the_model_has(llama: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are asked for of all tensors of the files; those of layers that a config leaves out are not read."""
    from weightload._install import read_ahead

    came: list[str] = []
    start = read_ahead.start_prefetch

    def watched(reader: Any, plan: dict[str, None], *arguments: Any, **options: Any) -> Any:
        came.extend(plan)
        return start(reader, plan, *arguments, **options)

    monkeypatch.setattr(read_ahead, "start_prefetch", watched)
    monkeypatch.setattr(read_ahead._C.TensorReader, "LEAST_FOR_THREADS", 1 << 20)
    calls = counted("transformers")
    evict(files_of(llama))
    found = AutoModelForCausalLM.from_pretrained(llama, num_hidden_layers=3)
    assert calls["safe_open"] >= len(files_of(llama))
    assert set(came) <= found.state_dict().keys()
    evict(files_of(llama))
    AutoModelForCausalLM.from_pretrained(llama)
    assert len(came) > 50
