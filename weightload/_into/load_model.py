"""load_model: a checkpoint file into a module, with safetensors' treatment of shared tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection

import torch

from weightload import _C
from weightload._base.handlers import pass_on
from weightload._base.paths import Path, as_text
from weightload._base.plain_torch import plainly
from weightload._base.printable import printable
from weightload._checkpoint.selection import Opening, open_files
from weightload._into.filling import Filling
from weightload._into.own_loading import SAVING, is_overridden
from weightload._into.places import PLAIN
from weightload._into.state_dict import match
from weightload._load import devices
from weightload._load.fetch import load_all
from weightload._load.options import Backend, device_of
from weightload._load.start import Source
from weightload._parts.shards import is_dtensor
from weightload._verify.checking import checked
from weightload._verify.digests import Verify, require_verify
from weightload.errors import StateDictError, located


def load_model(
    model: torch.nn.Module,
    filename: Path,
    strict: bool = True,
    device: devices.Device = "cpu",
    *,
    backend: Backend = "mmap",
    verify: Verify | None = None,
) -> tuple[set[str], list[str]]:
    """Load a file into a module's parameters and persistent buffers, wherever they are.

    Bytes are read straight into them, as by ``load_into``. If any of its modules takes part in its own loading (hooks,
    overridden methods, parameters without memory), ``load_state_dict`` gets the tensors of ``load_file``,
    under the caller's torch modes, which change nothing otherwise.

    Of names that share memory within the module, one must be in the file: the others are not missing, and are
    unexpected if the file has them too.

    Args:
        model: the module.
        filename: path of the safetensors file.
        strict: whether names that are missing or unexpected are an error; then nothing was loaded, unless the module
            took part.
        device: where ``load_state_dict`` gets the tensors, if it is needed.
        backend: the same; as for ``load_file``.
        verify: check the file's SHA-256 while it is loaded, as for ``safetensors_weights_iterator``. The verdict comes
            when the bytes are there already: after a ``ChecksumError`` the module must not be used.

    Returns:
        The module's names that were not loaded, and the file's that the module has no use for.

    Raises:
        StateDictError: (a ``RuntimeError``) names differ under ``strict``, shapes differ, or a tensor of the module is
            a DTensor.
        FileNotFoundError, HeaderError, ReadError, TensorError, OptionError, ChecksumError, CheckpointError: as
            ``load_file``.
    """
    target = device_of(device, backend)
    require_verify(verify)

    def load(open_it: Opening) -> tuple[set[str], list[str]]:
        files = open_it()
        try:
            return _load(model, files, strict, target, backend)
        finally:
            files.clear()  # an exception's traceback would keep them open through this frame

    return checked(as_text(filename), verify, functools.partial(open_files, [filename]), load)


def _load(
    model: torch.nn.Module,
    files: list[_C.CheckpointFile],
    strict: bool,
    device: torch.device,
    backend: str,
) -> tuple[set[str], list[str]]:
    names = files[0].names()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_dtensor(tensor):
            said = f"load_model takes no DTensors, as {printable(repr(name))} is one; load_into gives them their shards"
            raise located(StateDictError(said), files[0].path, name)
    matched = match(model, files, strict=False) if _is_plain(model) else None
    if matched is not None and matched.turns is not None:
        matched = None
    # Extra states and hooks are the user's code, and run in the user's modes; with keep_vars, torch's own asks torch
    # nothing. It is before the loading, which may make other tensors.
    state = model.state_dict(keep_vars=True) if matched is not None else model.state_dict()
    duplicates = _duplicates(state, names)
    if matched is not None:
        missing, unexpected = set(matched.absent), list(matched.unexpected)
    else:
        try:
            report = model.load_state_dict(load_all(files[0], device, backend), strict=False)
        except RuntimeError as error:
            pass_on(error)
            if type(error) is not RuntimeError:
                raise
            raise located(StateDictError(str(error)), files[0].path) from error
        missing, unexpected = set(report.missing_keys), list(report.unexpected_keys)
    for others in duplicates.values():
        unexpected += [name for name in others if name not in missing]
        missing.difference_update(others)
    if strict and (missing or unexpected):
        raise located(StateDictError(_in_words(model, missing, unexpected)), files[0].path)
    if matched is not None:
        Filling(matched, Source.of(files)).run()
    return missing, unexpected


@plainly
def _duplicates(state: dict[str, torch.Tensor], names: list[str]) -> dict[str, list[str]]:
    """Find names that share memory, as safetensors does: the one that counts, and the others."""
    plain = [
        tensor
        for tensor in state.values()
        if type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_quantized
    ]
    try:
        memory = {(tensor.device, tensor.untyped_storage().data_ptr()) for tensor in plain}
        if len(memory) == len(state):  # safetensors takes a while, and forgives errors in which a handler may run
            return {}
    except RuntimeError as failed:  # wrappers of torch.func have no memory of their own
        pass_on(failed)
    from safetensors.torch import _remove_duplicate_names  # not worth every process's time

    found: dict[str, list[str]] = _remove_duplicate_names(state, preferred_names=names)
    return found


@plainly
def _is_plain(model: torch.nn.Module) -> bool:
    """Whether the state_dict is torch's own, of plain memory; load_state_dict decides what to make of others."""
    for module in model.modules():
        if module._state_dict_hooks or any(is_overridden(module, name) for name in SAVING):
            return False
    return all(
        type(tensor) in PLAIN
        and not tensor.is_meta
        and not tensor.is_nested
        and tensor.layout is torch.strided
        and (tensor.nbytes == 0 or tensor.untyped_storage().nbytes() > 0)
        for tensor in [*model.parameters(), *model.buffers()]
    )


def _in_words(model: torch.nn.Module, missing: Collection[str], unexpected: Collection[str]) -> str:
    """Put missing and unexpected names in the words of load_state_dict and safetensors."""
    lines = [f"Error(s) in loading state_dict for {type(model).__name__}:"]
    for what, names in (("Missing", missing), ("Unexpected", unexpected)):
        if names:
            quoted = ", ".join(f'"{printable(name)}"' for name in sorted(names))
            lines.append(f"    {what} key(s) in state_dict: {quoted}")
    return "\n".join(lines)
