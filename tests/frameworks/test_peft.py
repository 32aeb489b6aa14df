"""PEFT: adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from counting import Counted, counted_loads, require  # noqa: F401

require("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402


def test_an_adapter(counted: Counted, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(8).reshape(1, 8)
    expected = adapted(tokens).logits
    calls = counted("peft", "transformers")
    found = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert calls["load_file"] == 1
    assert calls["safe_open"] >= 1
    assert torch.equal(found(tokens).logits, expected)
