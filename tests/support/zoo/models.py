"""Modules that load themselves in all the ways that are met, for the tests of load_into: makers and their names."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from support.zoo import hooks, parts, wrappers  # noqa: F401  # their modules are in the zoo too
from support.zoo.parts import (
    Carrying,
    Doubling,
    ExtraState,
    Holding,
    NoExtraState,
    Override,
    Parent,
    Quantised,
    WholeOverride,
)
from support.zoo.parts import animal as animal
from support.zoo.parts import chain as chain

ZOO = parts.ZOO


@animal
def plain() -> nn.Module:
    return chain(nn.LayerNorm(4))


@animal
def batch_norm() -> nn.Module:
    return chain(nn.BatchNorm1d(4))


@animal
def batch_norm_without_statistics() -> nn.Module:
    return chain(nn.BatchNorm1d(4, track_running_stats=False))


@animal
def batch_norm_without_count() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    norm.num_batches_tracked = None
    return chain(norm)


@animal
def sync_batch_norm() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(chain(nn.BatchNorm1d(4)))


@animal
def instance_norm() -> nn.Module:
    return chain(nn.InstanceNorm1d(4, affine=True))


@animal
def instance_norm_with_statistics() -> nn.Module:
    return chain(nn.InstanceNorm1d(4, affine=True, track_running_stats=True))


@animal
def attention() -> nn.Module:
    return chain(nn.MultiheadAttention(4, 2))


@animal
def transformer_layer() -> nn.Module:
    return chain(nn.TransformerEncoderLayer(4, 2, 8))


@animal
def recurrent() -> nn.Module:
    return chain(nn.LSTM(4, 4))


@animal
def weight_norm_of_old() -> nn.Module:
    return chain(nn.utils.weight_norm(nn.Linear(4, 4)))


@animal
def weight_norm() -> nn.Module:
    return chain(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


@animal
def spectral_norm_of_old() -> nn.Module:
    return chain(nn.utils.spectral_norm(nn.Linear(4, 4)))


@animal
def spectral_norm() -> nn.Module:
    return chain(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))


@animal
def orthogonal() -> nn.Module:
    return chain(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))


@animal
def pruned() -> nn.Module:
    from torch.nn.utils import prune

    return chain(prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5))


@animal
def override_of_the_class() -> nn.Module:
    return chain(Override())


@animal
def override_of_the_root() -> nn.Module:
    return Override()


@animal
def override_of_the_instance() -> nn.Module:
    layer = nn.Linear(4, 4)
    torchs = layer._load_from_state_dict

    def mine(state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[prefix + "bias"] = torch.full((4,), 3.0)
        torchs(state, prefix, *rest)

    layer._load_from_state_dict = mine  # type: ignore[method-assign,assignment]
    return chain(layer)


@animal
def rewrites_its_childrens() -> nn.Module:
    return chain(Parent())


@animal
def root_rewrites_its_childrens() -> nn.Module:
    return Parent()


@animal
def whole_override() -> nn.Module:
    return WholeOverride(nn.Linear(4, 4), nn.BatchNorm1d(4))


@animal
def whole_override_below_the_root() -> nn.Module:
    return chain(WholeOverride(nn.Linear(4, 4)))


@animal
def whole_override_of_the_instance() -> nn.Module:
    model = chain(nn.Linear(4, 4))
    torchs = model.load_state_dict
    model.load_state_dict = lambda state, strict=True: torchs({n: -t for n, t in state.items()}, strict)  # type: ignore
    return model


@animal
def extra_state() -> nn.Module:
    return chain(ExtraState())


@animal
def extra_state_that_is_no_tensor() -> nn.Module:
    return chain(NoExtraState())


@animal
def quantised() -> nn.Module:
    return chain(Quantised())


@animal
def carrying_parameter() -> nn.Module:
    return Holding(Carrying(torch.zeros(4, 4), requires_grad=False))


@animal
def parameter_of_a_class_of_its_own() -> nn.Module:
    return Holding(torch.zeros(4, 4).as_subclass(Doubling))


@animal
def observers() -> nn.Module:
    from torch.ao import quantization as q

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(4, 4), q.MinMaxObserver(), q.HistogramObserver(), q.FakeQuantize())


@animal
def observers_of_channels() -> nn.Module:
    from torch.ao import quantization as q

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = q.PerChannelMinMaxObserver()
        observer(torch.rand(4, 4))
        return nn.Sequential(nn.Linear(4, 4), observer)


@animal
def not_persistent() -> nn.Module:
    model = chain(nn.Linear(4, 4))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    model.register_buffer("none", None)
    return model


@animal
def none_for_a_child() -> nn.Module:
    model = chain(nn.Linear(4, 4))
    model.add_module("absent", None)
    return model


@animal
def shared_submodule() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.BatchNorm1d(4), layer)


@animal
def tied_over_an_override() -> nn.Module:
    """The plain one comes last: its tensor wins."""
    model = chain(Override())
    model[2].weight = model[1][0].weight
    return model


@animal
def tied_before_an_override() -> nn.Module:
    model = chain(Override())
    model[0].weight = model[1][0].weight
    return model


@animal
def shared_memory_over_an_override() -> nn.Module:
    """Two parameters of the same memory, and no common count of its changes."""
    model = chain(Override())
    model[2].weight = nn.Parameter(model[1][0].weight.data)
    return model


@animal
def shared_memory_before_an_override() -> nn.Module:
    model = chain(Override())
    model[0].weight = nn.Parameter(model[1][0].weight.data)
    return model


@animal
def compiled() -> nn.Module:
    compiled: nn.Module = torch.compile(chain(nn.BatchNorm1d(4)))  # type: ignore[assignment]
    return compiled


@animal
def wrapped() -> nn.Module:
    return nn.DataParallel(chain(nn.Linear(4, 4)))


@animal
def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = torch.jit.script(chain(nn.BatchNorm1d(4)))
    return module


@animal
def other_dtype() -> nn.Module:
    return chain(nn.BatchNorm1d(4)).bfloat16()


@animal
def transposed() -> nn.Module:
    model = chain(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).t())
    return model


@animal
def frozen_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return chain(nn.Linear(4, 4))


@animal
def float_quantised_tensor() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8)
    return Holding(torch.zeros(4, 4), buffer=buffer)


@animal
def lazy() -> nn.Module:
    return chain(nn.LazyLinear(4))


@animal
def without_memory() -> nn.Module:
    with torch.device("meta"):
        return chain(nn.Linear(4, 4))
