"""vLLM's loader for ``--load-format weightload``, without a model: its files, its extra config, its errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import STAND_INS, needs, same_weights, some_tensors, write_shards
from safetensors.torch import save_file

import weightload
from weightload._parts.lazy import LazyTensor
from weightload.integrations import vllm as plugin

pytestmark = needs("vllm")


@pytest.fixture(scope="module")
def engine() -> Any:
    """vLLM's module of loaders, the plugin registered."""
    sys.path.insert(0, str(STAND_INS))
    import torchvision_operators  # noqa: F401
    from vllm.model_executor import model_loader

    plugin.register()
    return model_loader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, some_tensors(), 3)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of weightload's iterator."""
    made: list[dict[str, Any]] = []
    original = weightload.safetensors_weights_iterator

    def counted(files: Any, **named: Any) -> Any:
        made.append({"files": files, **named, "settings": weightload.settings.current()})
        return original(files, **named)

    monkeypatch.setattr(weightload, "safetensors_weights_iterator", counted)
    return made


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Catch the plugin's log messages of every level; vLLM's logger keeps them to itself."""
    level = plugin._log.level
    plugin._log.setLevel(logging.INFO)
    plugin._log.addHandler(caplog.handler)
    yield caplog
    plugin._log.removeHandler(caplog.handler)
    plugin._log.setLevel(level)


def make(engine: Any, load_format: str = "weightload", extra: dict[str, Any] | None = None, **options: Any) -> Any:
    from vllm.config.load import LoadConfig

    config = LoadConfig(load_format=load_format, model_loader_extra_config=extra or {}, **options)
    return engine.get_model_loader(config)


def load(loader: Any, folder: Path) -> dict[str, torch.Tensor]:
    return dict(loader._get_weights_iterator(loader.Source(str(folder), None, prefix="at.")))


def test_registering_changes_no_other_format_and_happens_once(engine: Any) -> None:
    formats = dict(engine._LOAD_FORMAT_TO_MODEL_LOADER)
    iterator = sys.modules["vllm.model_executor.model_loader.default_loader"].safetensors_weights_iterator
    plugin.register()
    plugin.register()
    assert formats == engine._LOAD_FORMAT_TO_MODEL_LOADER
    assert formats["auto"] is formats["safetensors"] is engine.DefaultModelLoader
    assert issubclass(formats["weightload"], engine.DefaultModelLoader)
    assert iterator.__module__ == "vllm.model_executor.model_loader.weight_utils"


def test_the_weights_are_the_engines(engine: Any, folder: Path, calls: list[dict[str, Any]]) -> None:
    """With an index, files that it does not name are not read."""
    save_file({"of.another": torch.ones(3)}, folder / "consolidated.safetensors")
    own = load(make(engine, "safetensors"), folder)
    assert calls == []
    ours = load(make(engine), folder)
    assert same_weights(own, ours)
    assert set(ours) == {f"at.{name}" for name in some_tensors()}
    assert [Path(file).name for file in calls[0]["files"]] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert len(calls) == 1


def test_of_a_name_in_two_files_the_last_one_counts(engine: Any, tmp_path: Path) -> None:
    for number in (2, 10):
        save_file({"twice": torch.full((4,), number)}, tmp_path / f"part-{number}.safetensors")
    assert same_weights(load(make(engine, "safetensors"), tmp_path), load(make(engine), tmp_path))


def test_experts_of_other_ranks_are_not_read(engine: Any, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    tensors = {f"m.experts.{i}.w1.{part}": torch.full((2, 2), i) for i in range(4) for part in ("weight", "scale")}
    write_shards(tmp_path, tensors, 2)
    loaders = make(engine, "safetensors"), make(engine)
    for loader in loaders:
        loader.local_expert_ids = {1, 3}
    own, ours = (load(loader, tmp_path) for loader in loaders)
    assert same_weights(own, ours)
    assert len(ours) == 6  # two weights, and all scales
    assert len(calls) == 1


def test_extra_config_is_taken_out_before_the_engine_sees_it(
    engine: Any, folder: Path, calls: list[dict[str, Any]]
) -> None:
    extra = {"threads": 3, "window_bytes": 1 << 20, "pinned_bytes": 1 << 25, "backend": "pread", "device": "cpu"}
    from vllm.config.load import LoadConfig

    given = LoadConfig(load_format="weightload", model_loader_extra_config={**extra, "enable_weights_track": True})
    loader = engine.get_model_loader(given)
    assert given.load_format == "weightload"  # it is the engine's
    assert given.model_loader_extra_config == {**extra, "enable_weights_track": True}
    assert loader.load_config.model_loader_extra_config == {"enable_weights_track": True}
    assert loader.enable_weights_track is True
    assert same_weights(load(loader, folder), load(make(engine, "safetensors"), folder))
    used = calls[0]["settings"]
    assert (used.threads, used.window_bytes, used.pinned_bytes) == (3, 1 << 20, 1 << 25)
    assert calls[0]["backend"] == "pread"
    assert weightload.settings.current().threads == 0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"thread": 3}, "Unexpected extra config keys"),
        ({"threads": -1}, "threads=-1"),
        ({"strategy": "fast"}, "strategy"),
        ({"backend": "io_uring"}, "backend 'io_uring'"),
        ({"device": "cuda:1"}, "device 'cuda:1'"),
        ({"parts": "yes"}, "parts 'yes'"),
        ({"parts": True, "strategy": "striped"}, "parts: .* 'striped'"),
        ({"enable_multithread_load": True}, "enable_multithread_load"),
    ],
)
def test_extra_config_that_is_refused(engine: Any, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(engine, extra=extra)


def test_in_parts(engine: Any, folder: Path, calls: list[dict[str, Any]], said: pytest.LogCaptureFixture) -> None:
    """Without a call of the iterator, and with the engine's filters, order and settings."""
    loader = make(engine, extra={"parts": True, "threads": 3})
    loader.local_expert_ids = {0}
    save_file(
        {"m.experts.1.w1.weight": torch.ones(3), "layers.0.wide": torch.ones(128, 256)}, folder / "more.safetensors"
    )
    (folder / "model.safetensors.index.json").unlink()
    own = make(engine, "safetensors")
    own.local_expert_ids = {0}
    ours = load(loader, folder)
    assert isinstance(ours["at.layers.0.wide"], LazyTensor)
    assert "at.m.experts.1.w1.weight" not in ours
    assert same_weights(load(own, folder), {name: tensor.clone() for name, tensor in ours.items()})
    assert calls == []
    assert "weightload reads 4 files to the device cpu, in parts" in said.text
    assert "weightload has read" in said.text


def test_a_corrupt_shard(engine: Any, folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(weightload.HeaderError, match="model-00002-of-00003") as raised:
        load(make(engine), folder)
    assert type(raised.value).__name__ == "MetadataIncompleteBuffer"


def test_a_strategy_that_only_the_engine_knows_is_left_to_it(
    engine: Any, folder: Path, calls: list[dict[str, Any]], said: pytest.LogCaptureFixture
) -> None:
    loader = make(engine, safetensors_load_strategy="eager")
    load(loader, folder)
    assert calls[0]["backend"] == "pread"
    assert "weightload reads 3 files to the device cpu" in said.text
    with pytest.raises((ValueError, ImportError), match="torchao"):  # the engine's own: torchao is not installed
        load(make(engine, safetensors_load_strategy="torchao"), folder)
    assert len(calls) == 1
    assert "leaves this load to vLLM" in said.text


def test_leaving_early_stops_the_load(engine: Any, folder: Path) -> None:
    """The fixture of all tests looks for threads that are left."""
    loader = make(engine)
    weights = loader._get_weights_iterator(loader.Source(str(folder), None))
    next(weights)
    weights.close()


def test_a_version_that_does_not_fit_is_refused(
    engine: Any, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    class Moved(engine.BaseModelLoader):  # type: ignore[misc, name-defined]
        pass

    monkeypatch.setattr(engine, "DefaultModelLoader", Moved)
    formats = dict(engine._LOAD_FORMAT_TO_MODEL_LOADER)
    plugin.register.__wrapped__()
    assert formats == engine._LOAD_FORMAT_TO_MODEL_LOADER
    assert "does not know this version of vLLM" in said.text


@pytest.mark.simulated
def test_an_accelerator_where_it_is_asked_for(
    engine: Any, folder: Path, calls: list[dict[str, Any]], simulated: Any
) -> None:
    """On the device that the engine has chosen, with memory on no other, and not without being asked."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    own = load(make(engine, "safetensors"), folder)
    assert load(make(engine), folder)["at.steps"].device.type == "cpu"
    torch.accelerator.set_device_index(1)
    try:
        small = {"pinned_bytes": 64 << 10, "slot_bytes": 16 << 10, "device_block_bytes": 32 << 10}
        ours = load(make(engine, extra={"device": kind.type, **small}), folder)
    finally:
        torch.accelerator.set_device_index(0)
    assert {str(tensor.device) for tensor in ours.values()} == {f"{kind.type}:1"}
    assert same_weights(own, {name: tensor.cpu() for name, tensor in ours.items()})
    assert simulated.live_bytes(0) == 0
    assert calls[1]["settings"].pinned_bytes == 64 << 10
    if kind.type != "cuda":
        with pytest.raises(ValueError, match="device 'cuda'"):
            make(engine, extra={"device": "cuda"})
