"""hf://: in the hub's cache first, else from the hub, without a download. The hub is a server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import save_file
from servers import Answer, Handler, serving

SHA = "0123456789abcdef0123456789abcdef01234567"

SCRIPT = """
    import sys, torch, weightload
    from huggingface_hub import HfApi

    files = weightload.resolve_safetensors_files(sys.argv[1], subfolder="transformer")
    print(files)
    for name, tensor in weightload.safetensors_weights_iterator(files, to_cpu=True):
        print(name, tensor.sum().item())
    print(weightload.load_file(sys.argv[1] + "/transformer/model-00001-of-00002.safetensors")["a"].shape)
"""


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(5, 7)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.full((4,), 3.0)}, folder / "model-00002-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def hub_of(files: Path) -> Answer:
    """Answers as the hub does."""

    def hub(handler: Handler) -> bool:
        path = handler.path.partition("?")[0]
        if path.startswith("/api/models/org/model"):
            tree = [
                {"type": "file", "path": f"transformer/{file.name}", "size": file.stat().st_size, "oid": SHA}
                for file in (files / "transformer").iterdir()
            ]
            answer: object = tree if "/tree/" in path else {"id": "org/model", "sha": SHA, "siblings": []}
            handler.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return True
        start = f"/org/model/resolve/{SHA}/"
        for revision in (start, "/org/model/resolve/main/"):
            if path.startswith(revision):
                handler.path = "/" + path[len(revision) :]
                return False
        handler.reply(404)
        return True

    return hub


def run(tmp_path: Path, url: str, address: str, script: str = SCRIPT) -> list[str]:
    environ = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_SECRET", "PATH": "/usr/bin:/bin"}
    environ["PYTHONPATH"] = ":".join(sys.path)
    command = [sys.executable, "-c", textwrap.dedent(script), address]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "SECRET" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_from_the_hub_and_from_its_cache(tmp_path: Path) -> None:
    files = tmp_path / "files"
    make(files / "transformer")
    with serving(files) as web:
        web.before = hub_of(files)
        told = run(tmp_path, web.url, "hf://org/model")
        first = f"hf://org/model@{SHA}/transformer/model-00001-of-00002.safetensors"
        assert first in told[0]
        assert told[1:] == ["a 35.0", "b 12.0", "torch.Size([5, 7])"]
        assert any(headers.get("authorization") == "Bearer hf_SECRET" for headers in web.headers)

        # The hub's cache has the model as well now: nobody is asked.
        snapshot = tmp_path / "home" / "hub" / "models--org--model" / "snapshots" / SHA
        make(snapshot / "transformer")
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text(SHA)
        web.asked.clear()
        told = run(tmp_path, web.url, "hf://org/model")
        assert str(snapshot) in told[0]
        assert told[1:] == ["a 35.0", "b 12.0", "torch.Size([5, 7])"]
        assert not web.asked


COPIES = """
    import os, sys, weightload

    cache = os.environ["HF_HOME"] + "/copies"
    print(weightload.load_file(sys.argv[1], cache=cache)["a"].sum().item())
    weights = weightload.safetensors_weights_iterator([sys.argv[1]], to_cpu=True, cache=cache)
    print(len(dict(weights)), weights.stats().files[0].path.startswith(cache))
"""


def test_copies_of_a_commit_need_no_hub(tmp_path: Path) -> None:
    files = tmp_path / "files"
    make(files / "transformer")
    name = "transformer/model-00001-of-00002.safetensors"
    with serving(files) as web:
        web.before = hub_of(files)
        for asked in (1, 0):
            told = run(tmp_path, web.url, f"hf://org/model@{SHA}/{name}", COPIES)
            assert told == ["35.0", "1 True"]
            assert len(web.asked) == asked
            web.asked.clear()
        for asked in (2, 2):  # main may be another commit by now
            told = run(tmp_path, web.url, f"hf://org/model/{name}", COPIES)
            assert told == ["35.0", "1 True"]
            assert len(web.asked) == asked
            web.asked.clear()
