"""DTensors in modules that torch has wrapped or parametrised load in place, by the names that the state_dict gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.parts import rank_of
from support.ranks.groups import assert_done, run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import weightload
from weightload import errors

WRAPPED = """
import os
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing, checkpoint_wrapper, offload_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
import safetensors.torch

path, mesh = sys.argv[4], init_device_mesh("cpu", (2,))

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.tokens.weight
    def forward(self, x):
        x = self.tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

def layers_inside(model, wrap):
    for number, layer in enumerate(model.layers):
        model.layers[number] = wrap(layer)
        fully_shard(model.layers[number], mesh=mesh)
    return fully_shard(model, mesh=mesh)

def layers_outside(model, wrap):
    for number, layer in enumerate(model.layers):
        model.layers[number] = wrap(fully_shard(layer, mesh=mesh))
    return fully_shard(model, mesh=mesh)

def root(model, wrap):
    model = wrap(layers_inside(model, wrap)) if wrap is not offload_wrapper else layers_inside(model, wrap)
    return model

def below_one_another(model, wrap):
    for layer in model.layers:
        layer.up = wrap(layer.up)
    return layers_outside(model, lambda layer: offload_wrapper(wrap(layer)))

def by_torch(model, wrap):
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda part: isinstance(part, Layer))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def root_alone(model, wrap):
    return fully_shard(wrap(model), mesh=mesh)

def with_hooks_after(model, wrap):
    called.clear()
    for layer in model.layers:
        layer.register_load_state_dict_post_hook(lambda module, keys: called.append(type(module).__name__))
    return layers_inside(model, wrap)

def compiled(model, wrap):
    model = layers_inside(model, wrap)
    for layer in model.layers:
        layer.compile(backend="eager")
    return model

called = []
torch.manual_seed(1)
x = torch.randint(0, 7, (3,))
plain = Net()
weightload.load_into(plain, path)
expected = plain(x)
whole = safetensors.torch.load_file(path)
torch.manual_seed(2 + rank)
for kind in (layers_inside, layers_outside, root, below_one_another, by_torch, root_alone, with_hooks_after, compiled):
    for wrap in (checkpoint_wrapper, offload_wrapper):
        for swap in (False, True):
            model = kind(Net(), wrap)
            words = f"{kind.__name__}, {wrap.__name__}, {swap}"
            identities = {name: id(tensor) for name, tensor in model.named_parameters()}
            torch.__future__.set_swap_module_params_on_conversion(swap)
            report = weightload.load_into(model, path)
            torch.__future__.set_swap_module_params_on_conversion(False)
            assert report.took_part == [] and report.missing == [] and report.unexpected == [], (words, report)
            assert report.in_place == len(report.loaded) == len(whole), (words, report)
            assert identities == {name: id(tensor) for name, tensor in model.named_parameters()}, words
            state = model.state_dict()
            assert set(state) == {*whole, "head.weight"}
            for name, tensor in whole.items():
                assert isinstance(state[name], DTensor)
                assert torch.equal(state[name].full_tensor(), tensor), (words, name)
            torch.testing.assert_close(model(x), expected, msg=lambda text: f"{words}: {text}")
            model(x).sum().backward()
assert called.count("Layer") + called.count("FSDPLayer") > 0, called

# Differences are raised before any byte is read, by the names of the state_dict.
model = by_torch(Net(), checkpoint_wrapper)
with torch.no_grad():
    for tensor in model.parameters():
        tensor.zero_()
safetensors.torch.save_file(
    {"layers.1.more": torch.ones(2)} | {n: t for n, t in whole.items() if n != "layers.2.up.bias"}, f"{path}.{rank}"
)
try:
    weightload.load_into(model, f"{path}.{rank}")
except weightload.errors.StateDictError as error:
    assert "missing from the checkpoint: layers.2.up.bias" in str(error), error
    assert "unexpected in the checkpoint: layers.1.more" in str(error), error
    assert "partly" not in str(error)
else:
    raise AssertionError
assert not any(tensor.to_local().any() for tensor in model.parameters())
report = weightload.load_into(model, f"{path}.{rank}", strict=False)
assert (report.missing, report.unexpected) == (["layers.2.up.bias"], ["layers.1.more"]), report
assert torch.equal(model.state_dict()["layers.2.up.weight"].full_tensor(), whole["layers.2.up.weight"])

# Data parallelism keeps its prefix, as load_state_dict does.
ddp = nn.parallel.DistributedDataParallel(Net())
report = weightload.load_into(ddp, path, strict=False)
assert report.loaded == []
weightload.load_into(ddp.module, path)
torch.testing.assert_close(ddp(x), expected)
safetensors.torch.save_file({f"module.{name}": tensor + 1 for name, tensor in whole.items()}, f"{path}.{rank}")
assert weightload.load_into(ddp, f"{path}.{rank}").in_place == len(whole)
assert torch.equal(ddp.module.layers[1].up.weight, whole["layers.1.up.weight"] + 1)
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_wrapped_modules_of_fsdp_load_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"tokens.weight": torch.rand(7, 6)}
    for number in range(3):
        for name, part in (("norm", nn.LayerNorm(6)), ("up", nn.Linear(6, 9)), ("down", nn.Linear(9, 6))):
            for key in part.state_dict():
                state[f"layers.{number}.{name}.{key}"] = torch.rand_like(part.state_dict()[key])
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    assert_done(run_ranks(WRAPPED, 2, tmp_path, tmp_path / "m.safetensors"))


def loads_in_place(model: nn.Module, path: Path) -> None:
    """Require that a load fills the state_dict's contiguous tensors in place, and all of them rightly."""
    whole = {name: torch.rand(tensor.shape) for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(whole, path)
    report = weightload.load_into(model, path)
    strided = sum(not tensor.is_contiguous() for tensor in model.state_dict().values())  # that of orthogonal
    assert (report.took_part, report.in_place) == ([], len(whole) - strided)
    for name, tensor in model.state_dict().items():
        expected = whole[name]
        if isinstance(tensor, DTensor):
            # torch keeps meshes for good, so that of a process that was another rank before may be that one's.
            (place,) = tensor.device_mesh.get_coordinate() or (0,)
            tensor, expected = tensor.to_local(), expected.chunk(2)[place]
        assert torch.equal(tensor, expected), name


PARAMETRISED: dict[str, Any] = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "wrapped weight norm": lambda layer: checkpoint_wrapper(nn.utils.parametrizations.weight_norm(layer)),
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight norm of old": nn.utils.weight_norm,
    "wrapped twice": lambda layer: offload_wrapper(checkpoint_wrapper(layer)),
    "compiled": lambda layer: torch.compile(layer),
    "compiled and wrapped": lambda layer: checkpoint_wrapper(torch.compile(layer)),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PARAMETRISED)
def test_parametrised_and_compiled_modules_of_fsdp(kind: str, tmp_path: Path) -> None:
    with rank_of((2,), 1) as mesh:
        model = nn.Sequential(PARAMETRISED[kind](nn.Linear(4, 4)), nn.Linear(4, 4))
        fully_shard(model, mesh=mesh)
        loads_in_place(model, tmp_path / "m.safetensors")


def test_old_names_of_weight_norm_are_left_to_its_hook(tmp_path: Path) -> None:
    old = {"weight_g": torch.rand(4, 1), "weight_v": torch.rand(4, 4), "bias": torch.rand(4)}
    safetensors.torch.save_file(old, tmp_path / "m.safetensors")
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert weightload.load_into(model, tmp_path / "m.safetensors").took_part == [""]
    assert torch.equal(model.parametrizations.weight.original1, old["weight_v"])  # type: ignore[union-attr,index]
    with rank_of((2,), 0) as mesh:
        fully_shard(model, mesh=mesh)
        with pytest.raises(errors.StateDictError, match="takes part in its own loading"):
            weightload.load_into(model, tmp_path / "m.safetensors")


def test_a_hook_of_the_users_in_a_wrapper_keeps_shards_out(tmp_path: Path) -> None:
    """It may do anything, and gets whole tensors."""
    for outside in (True, False):
        inner = nn.Linear(4, 4)
        model = nn.Sequential(checkpoint_wrapper(inner))
        safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
        (model[0] if outside else inner).register_load_state_dict_pre_hook(lambda *_: None)
        with rank_of((2,), 0) as mesh:
            fully_shard(model, mesh=mesh)
            with pytest.raises(errors.StateDictError, match=r"'0.weight' .* takes part in its own loading"):
                weightload.load_into(model, tmp_path / "m.safetensors")


def test_a_tensor_that_loads_itself_is_not_swapped_for(tmp_path: Path) -> None:
    """Even if it is a DTensor."""

    class Own(DTensor):
        def module_load(self, other: torch.Tensor, assign: bool = False) -> torch.Tensor:
            raise NotImplementedError

    from weightload._into.own_loading import _loads_itself

    with rank_of((2,), 0) as mesh:
        shard = DTensor.from_local(torch.zeros(2), mesh, run_check=False)
        assert not _loads_itself(shard)
        shard.__class__ = Own
        assert _loads_itself(shard)
