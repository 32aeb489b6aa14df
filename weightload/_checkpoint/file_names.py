"""Reads the names of files: shard numbers, variants, and files that are no part of a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

ENDING = ".safetensors"

# The names under which transformers and diffusers save a model, and one that renamed checkpoints have. Where one of
# the first is present, other files beside it are extras; where none is, the same goes for the next.
CANONICAL_STEMS = (("model", "diffusion_pytorch_model"), ("pytorch_model",))

# model-00001-of-00002, model_00001-of-00002, model-1-of-2, model.safetensors-00001-of-00002,
# model-00001-of-00002.fp16 and model.fp16-00001-of-00002.
_SHARD = re.compile(
    r"(?P<stem>.*?)(?P<before>[-_.]?)(?P<number>[0-9]+)(?P<of>[-_]of[-_])(?P<count>[0-9]+)(?P<rest>(?![0-9]).*)",
    re.I | re.S,
)

# Endings that say how numbers are stored. Others make a variant only of a name that is there without them.
_PRECISION = re.compile(r"(bf|fp|f|int|nf|q|e)[0-9]+\w*|float[0-9]+|half|full|gguf|awq|gptq", re.I)

# Words of names. They are compared whole: `flora` and `exploration` are about plants and journeys.
_LORA = re.compile(r"q?loras?[0-9]*(v[0-9]+)?|lycoris|locon|loha|lokr")
_MERGED = {"merged", "fused", "baked"}  # into a model
_STATE_KEYS = {"optimizer", "optimizers", "optim", "scheduler", "schedulers", "scaler", "rng"}
_STATES = {"state", "states"}
_STATE_WORDS = _STATE_KEYS | _STATES | {
    "lr", "grad", "random", "sampler", "trainer", "training", "dict", "args", "rank", "step", "steps", "epoch",
    "world", "size", "torch", "pytorch", "checkpoint", "ckpt", "last", "latest", "final", "shard", "bin", "fp32",
    "adam", "adamw",
}  # fmt: skip

# Whole names, as those who save them have chosen: PEFT, diffusers, MLX.
_ADAPTERS = {
    "adapter model": "an adapter",
    "adapters": "an adapter",
    "pytorch lora weights": "an adapter",
    "learned embeds": "embeddings of textual inversion",
    "pytorch custom diffusion weights": "an adapter",
}


class Shard(NamedTuple):
    """A shard's number, and what is the same in the names of all shards of its set."""

    before: str
    behind: str
    number: int
    total: int
    digits: int
    """How many a number has at least."""

    def name(self, number: int) -> str:
        """The name of another shard of the set."""
        return f"{self.before}{number:0{self.digits}d}{self.behind}"


def shard_of(name: str) -> Shard | None:
    """The set of shards that a name tells of; None where it tells of none."""
    match = _SHARD.fullmatch(name.removesuffix(ENDING))
    if match is None:
        return None
    start, end = match.span("number")
    number = match["number"]
    return Shard(name[:start], name[end:], int(number), int(match["count"]), len(number) if number[0] == "0" else 1)


def family(name: str) -> str:
    """The name without ending and shard number: ``model.fp16-00001-of-00002.safetensors`` is ``model.fp16``."""
    stem = name.removesuffix(ENDING)
    match = _SHARD.fullmatch(stem)
    return match["stem"].removesuffix(ENDING) + match["rest"] if match else stem


def is_canonical(stem: str) -> bool:
    """Whether a model is known by this name."""
    return any(stem in stems for stems in CANONICAL_STEMS)


def split_variant(stem: str, variant: str | None, others: Collection[str]) -> tuple[str, str | None]:
    """Split ``model.fp16`` into stem and variant. ``others``: the families of all files, this one's among them.

    A dot alone makes no variant (``v1.5`` is a name): the ending counts as one when it was asked for, when what is
    before it is a canonical name or that of another file, or when it says how numbers are stored and another file
    differs in that only.
    """
    base, dot, ending = stem.rpartition(".")
    if not dot:
        return stem, None
    known = ending == variant or is_canonical(base) or base in others
    if not known and _PRECISION.fullmatch(ending):
        siblings = (other.rpartition(".") for other in others if other != stem)
        known = any(other == base and _PRECISION.fullmatch(last) for other, _, last in siblings)
    return (base, ending) if known else (stem, None)


def words(stem: str) -> list[str]:
    """The words of a name, in lower case."""
    return [word.lower() for word in re.findall(r"[^\W_]+", stem)]


def what_it_is(stem: str, others: Iterable[str], adapter_config: bool, config: bool) -> str | None:
    """Describes a file that is no model and no part of one; None if it may be one.

    Args:
        stem: the name without ending, shard number and variant.
        others: those of the files beside it.
        adapter_config, config: whether there is an ``adapter_config.json``, and a ``config.json``.
    """
    own = words(stem)
    if is_canonical(stem) or not own:
        return None
    bare = " ".join(word for word in own if not word.isdigit())
    if bare in _ADAPTERS:
        return _ADAPTERS[bare]
    if any(_LORA.fullmatch(word) for word in own) and not _MERGED & set(own):
        return "an adapter"
    if adapter_config and (not config or {"adapter", "adapters"} & set(own)):
        return "an adapter"
    if bare == "consolidated":
        return "a consolidated copy"
    if _is_state(own):
        return "a trainer's state"
    return _copy_of_another(own, {tuple(words(other)) for other in others if other != stem})


def _is_state(own: list[str]) -> bool:
    pairs = set(itertools.pairwise(own))
    if any(first in _STATE_KEYS and second in _STATES for first, second in pairs):
        return True
    if any(pair in (("random", "states"), ("training", "args"), ("trainer", "state")) for pair in pairs):
        return True
    return bool(_STATE_KEYS & set(own)) and all(word in _STATE_WORDS or word.isdigit() for word in own)


def _copy_of_another(own: list[str], others: set[tuple[str, ...]]) -> str | None:
    """By a word that only sets it apart from another file: ``unet_ema`` beside ``unet``."""
    for marks, what in (
        ({"ema"}, "an EMA copy"),
        ({"consolidated"}, "a consolidated copy"),
        (_STATE_KEYS, "a trainer's state"),
    ):
        if marks & set(own) and tuple(word for word in own if word not in marks) in others:
            return what
    return None
