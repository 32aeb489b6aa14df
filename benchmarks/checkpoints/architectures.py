"""Tensor names, shapes and dtypes of real models, by layer, for synthetic checkpoints.

Sources: the published configurations (config.json) of the models, and the module names of transformers and
diffusers, as of 2025.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

Shape = tuple[int, ...]
Entry = tuple[str, str, Shape]  # name, safetensors dtype, shape


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model whose size is scaled by its number of layers."""

    file_stem: str
    layers: int  # of the real model
    before: Callable[[], Iterator[Entry]]
    layer: Callable[[int], Iterator[Entry]]
    after: Callable[[], Iterator[Entry]]

    def entries(self, layers: int | None = None) -> list[Entry]:
        """All tensors of the model with its first ``layers`` layers (default: all)."""
        count = self.layers if layers is None else min(layers, self.layers)
        middle = [entry for index in range(count) for entry in self.layer(index)]
        return [*self.before(), *middle, *self.after()]


def _linear(name: str, dtype: str, out: int, inner: int) -> Iterator[Entry]:
    yield f"{name}.weight", dtype, (out, inner)
    yield f"{name}.bias", dtype, (out,)


def _decoder_layer(index: int, hidden: int, queries: int, keys: int) -> Iterator[Entry]:
    prefix = f"model.layers.{index}"
    yield f"{prefix}.input_layernorm.weight", "BF16", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)
    for name, out in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{prefix}.self_attn.{name}_proj.weight", "BF16", (out, hidden)
    yield f"{prefix}.self_attn.o_proj.weight", "BF16", (hidden, queries)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[Entry]:
    yield f"{prefix}.gate_proj.weight", "BF16", (inner, hidden)
    yield f"{prefix}.up_proj.weight", "BF16", (inner, hidden)
    yield f"{prefix}.down_proj.weight", "BF16", (hidden, inner)


def _embedding(vocabulary: int, hidden: int) -> Iterator[Entry]:
    yield "model.embed_tokens.weight", "BF16", (vocabulary, hidden)


def _head(vocabulary: int, hidden: int) -> Iterator[Entry]:
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocabulary, hidden)


def _llama_layer(index: int) -> Iterator[Entry]:
    yield from _decoder_layer(index, 4096, 4096, 1024)
    yield from _mlp(f"model.layers.{index}.mlp", 4096, 14336)


def _qwen_moe_layer(
    index: int, hidden: int = 2048, queries: int = 4096, keys: int = 512, inner: int = 768
) -> Iterator[Entry]:
    prefix = f"model.layers.{index}"
    yield from _decoder_layer(index, hidden, queries, keys)
    yield f"{prefix}.self_attn.q_norm.weight", "BF16", (128,)
    yield f"{prefix}.self_attn.k_norm.weight", "BF16", (128,)
    yield f"{prefix}.mlp.gate.weight", "BF16", (128, hidden)
    for expert in range(128):
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, inner)


def _narrow_qwen_moe_layer(index: int) -> Iterator[Entry]:
    """Half as many heads and half the width, and experts of a quarter of theirs."""
    yield from _qwen_moe_layer(index, 1024, 2048, 256, 192)


def _wan_before() -> Iterator[Entry]:
    dim, dtype = 5120, "F32"
    yield "patch_embedding.weight", dtype, (dim, 16, 1, 2, 2)
    yield "patch_embedding.bias", dtype, (dim,)
    yield "scale_shift_table", dtype, (1, 2, dim)
    yield from _linear("condition_embedder.time_embedder.linear_1", dtype, dim, 256)
    yield from _linear("condition_embedder.time_embedder.linear_2", dtype, dim, dim)
    yield from _linear("condition_embedder.time_proj", dtype, 6 * dim, dim)
    yield from _linear("condition_embedder.text_embedder.linear_1", dtype, dim, 4096)
    yield from _linear("condition_embedder.text_embedder.linear_2", dtype, dim, dim)


def _wan_layer(index: int) -> Iterator[Entry]:
    prefix, dim, dtype = f"blocks.{index}", 5120, "F32"
    yield f"{prefix}.scale_shift_table", dtype, (1, 6, dim)
    for attention in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{prefix}.{attention}.{name}", dtype, dim, dim)
        yield f"{prefix}.{attention}.norm_q.weight", dtype, (dim,)
        yield f"{prefix}.{attention}.norm_k.weight", dtype, (dim,)
    yield f"{prefix}.norm2.weight", dtype, (dim,)
    yield f"{prefix}.norm2.bias", dtype, (dim,)
    yield from _linear(f"{prefix}.ffn.net.0.proj", dtype, 13824, dim)
    yield from _linear(f"{prefix}.ffn.net.2", dtype, dim, 13824)


def _wan_after() -> Iterator[Entry]:
    yield from _linear("proj_out", "F32", 64, 5120)


def _hunyuan_before() -> Iterator[Entry]:
    dim, dtype = 3072, "BF16"
    yield "x_embedder.proj.weight", dtype, (dim, 16, 1, 2, 2)
    yield "x_embedder.proj.bias", dtype, (dim,)
    time_text = "context_embedder.time_text_embed"
    yield from _linear(f"{time_text}.timestep_embedder.linear_1", dtype, dim, 256)
    yield from _linear(f"{time_text}.timestep_embedder.linear_2", dtype, dim, dim)
    yield from _linear(f"{time_text}.text_embedder.linear_1", dtype, dim, 4096)
    yield from _linear(f"{time_text}.text_embedder.linear_2", dtype, dim, dim)
    yield from _linear("context_embedder.proj_in", dtype, dim, 4096)
    for block in range(2):
        prefix = f"context_embedder.token_refiner.refiner_blocks.{block}"
        for norm in ("norm1", "norm2"):
            yield f"{prefix}.{norm}.weight", dtype, (dim,)
            yield f"{prefix}.{norm}.bias", dtype, (dim,)
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"):
            yield from _linear(f"{prefix}.{name}", dtype, dim, dim)
        yield from _linear(f"{prefix}.ff.net.0.proj", dtype, 4 * dim, dim)
        yield from _linear(f"{prefix}.ff.net.2", dtype, dim, 4 * dim)
        yield from _linear(f"{prefix}.norm_out.linear", dtype, 2 * dim, dim)
    for name, inner in (("timestep_embedder", 256), ("guidance_embedder", 256), ("text_embedder", 768)):
        yield from _linear(f"time_text_embed.{name}.linear_1", dtype, dim, inner)
        yield from _linear(f"time_text_embed.{name}.linear_2", dtype, dim, dim)


def _hunyuan_layer(index: int) -> Iterator[Entry]:
    """20 blocks of two streams, then 40 of one, taken in turn so that a scaled model has both kinds."""
    dim, dtype = 3072, "BF16"
    if index % 3 == 0:
        prefix = f"transformer_blocks.{index // 3}"
        for name in ("norm1.linear", "norm1_context.linear"):
            yield from _linear(f"{prefix}.{name}", dtype, 6 * dim, dim)
        for name in (
            "to_q",
            "to_k",
            "to_v",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_out.0",
            "to_add_out",
        ):
            yield from _linear(f"{prefix}.attn.{name}", dtype, dim, dim)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{prefix}.attn.{name}.weight", dtype, (128,)
        for name in ("ff", "ff_context"):
            yield from _linear(f"{prefix}.{name}.net.0.proj", dtype, 4 * dim, dim)
            yield from _linear(f"{prefix}.{name}.net.2", dtype, dim, 4 * dim)
        return
    prefix = f"single_transformer_blocks.{index // 3 * 2 + index % 3 - 1}"
    for name in ("attn.to_q", "attn.to_k", "attn.to_v"):
        yield from _linear(f"{prefix}.{name}", dtype, dim, dim)
    for name in ("attn.norm_q", "attn.norm_k"):
        yield f"{prefix}.{name}.weight", dtype, (128,)
    yield from _linear(f"{prefix}.norm.linear", dtype, 3 * dim, dim)
    yield from _linear(f"{prefix}.proj_mlp", dtype, 4 * dim, dim)
    yield from _linear(f"{prefix}.proj_out", dtype, dim, 5 * dim)


def _hunyuan_after() -> Iterator[Entry]:
    yield from _linear("norm_out.linear", "BF16", 6144, 3072)
    yield from _linear("proj_out", "BF16", 64, 3072)


def _nothing() -> Iterator[Entry]:
    return iter(())


def _small_layer(index: int) -> Iterator[Entry]:
    """1,000 tensors of 2 KiB: what is left of a load when there are hardly any bytes."""
    for number in range(1000):
        yield f"blocks.{index}.adapters.{number}.weight", "BF16", (32, 32)


ARCHITECTURES: dict[str, Architecture] = {
    "llama-3-8b": Architecture(
        "model", 32, lambda: _embedding(128256, 4096), _llama_layer, lambda: _head(128256, 4096)
    ),
    "wan2.1-14b": Architecture("diffusion_pytorch_model", 40, _wan_before, _wan_layer, _wan_after),
    "hunyuanvideo": Architecture("diffusion_pytorch_model", 60, _hunyuan_before, _hunyuan_layer, _hunyuan_after),
    "qwen3-30b-a3b": Architecture(
        "model", 48, lambda: _embedding(151936, 2048), _qwen_moe_layer, lambda: _head(151936, 2048)
    ),
    # The same tensors as qwen3-30b-a3b, with an eighth of the bytes: many tensors on a machine with little disk.
    "qwen3-30b-a3b-narrow": Architecture(
        "model", 48, lambda: _embedding(151936, 1024), _narrow_qwen_moe_layer, lambda: _head(151936, 1024)
    ),
    "small-tensors": Architecture("model", 20, _nothing, _small_layer, _nothing),
}
