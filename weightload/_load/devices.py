"""Which device a load goes to."""

from __future__ import annotations

import os

import torch

from weightload._base.handlers import forgiven, pass_on
from weightload._base.plain_torch import plainly
from weightload.errors import WeightLoadError

Device = torch.device | str | int
CPU = plainly(torch.device)("cpu")


def accelerator() -> torch.device | None:
    """The kind of accelerator of this process, without an index; None where there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def default_device() -> torch.device:
    """The accelerator of this process, or the CPU where there is none.

    Under a launcher that is the one with the number ``LOCAL_RANK``; where the launcher shows each process its own
    accelerator only, or there is no launcher, the current one.
    """
    kind = accelerator()
    if kind is None:
        return CPU
    number = os.environ.get("LOCAL_RANK", "")
    if number.isdigit() and int(number) < torch.accelerator.device_count():
        return torch.device(kind.type, int(number))
    return torch.device(kind.type, torch.accelerator.current_device_index())


@plainly
def resolve(device: Device | None) -> torch.device:
    """The CPU, or an accelerator with its index: ``device``, or ``default_device()`` for None.

    Raises:
        ValueError: a device that is neither the CPU nor an accelerator that this torch can use.
        WeightLoadError: a process that was forked after its parent had used the accelerator.
    """
    try:
        named = torch.device(device) if isinstance(device, (str, torch.device)) else None
    except RuntimeError as error:
        pass_on(error)
        raise ValueError(f"no such device: {str(error).splitlines()[0]}") from None
    if named is None and device is not None and not isinstance(device, int):
        raise ValueError(f"device={device!r}: must be a torch.device, its name or its number")
    if named is None or named.type != "cpu":
        _require_unforked()
    if named is not None:
        target = named
    elif isinstance(device, int):
        kind = accelerator()
        if kind is None:
            raise ValueError(f"device={device}: torch has no accelerator here")
        if device < 0:  # of which torch makes no device; one too large is refused below
            raise ValueError(f"device={device}: must be the number of a device")
        target = torch.device(kind.type, device)
    else:
        target = default_device()
    if target.type == "cpu":
        return CPU
    if target.type == "meta":
        raise ValueError("cannot load to meta: its tensors have no bytes")
    kind = accelerator()
    if kind is None or kind.type != target.type:
        raise ValueError(f"cannot load to {target}: torch has {f'{kind.type!r}' if kind else 'no accelerator'} here")
    index = torch.accelerator.current_device_index() if target.index is None else target.index
    if not 0 <= index < torch.accelerator.device_count():
        raise ValueError(f"cannot load to {target}: torch sees {torch.accelerator.device_count()} devices")
    return torch.device(target.type, index)


@plainly
def kind_of(device: Device | None) -> str:
    """The type of device that is meant, whether or not it is there; of what is none, the default's."""
    if isinstance(device, (str, torch.device)):
        with forgiven(RuntimeError):
            return torch.device(device).type
    kind = accelerator()
    return kind.type if kind else "cpu"


def require_no_capture(device: torch.device) -> None:
    """Say it before anything is queued: what a capture records does not run, and asking for events would spoil it.

    Raises:
        WeightLoadError: the current stream of the accelerator is being captured, as for a CUDA graph.
    """
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    if capturing is not None and capturing():
        raise WeightLoadError(
            f"cannot load to {device} while its current stream is being captured: load before the capture or after it"
        )


def _require_unforked() -> None:
    """Say it before torch is asked for anything that would set the accelerator up."""
    kind = accelerator()
    if kind is not None and getattr(torch.get_device_module(kind), "_is_in_bad_fork", bool)():
        raise WeightLoadError(
            f"cannot load to {kind.type!r} in a forked child of a process that uses it: "
            "start processes by the 'spawn' or 'forkserver' method"
        )
