"""A simulated accelerator: a torch device (PrivateUse1) whose work is done by threads, late and out of step.

``load()`` builds it, the first time, and registers it as ``simulated:0`` and ``simulated:1``.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / ".build" / "simulated_accelerator"


@functools.cache
def load() -> Any:
    """The extension module, with its device registered; not available to torch until ``set_available(True)``."""
    BUILD.mkdir(parents=True, exist_ok=True)
    # ninja is beside the interpreter, whether or not the environment was activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    native = cpp_extension.load(
        "simulated_accelerator",
        [str(path) for path in sorted(HERE.glob("*.cpp"))],
        extra_cflags=["-O1", "-g0", "-Wall", "-Wextra"],
        build_directory=str(BUILD),
    )
    torch.utils.rename_privateuse1_backend("simulated")
    torch._register_device_module("simulated", _device_module(native))
    native.side_streams = lambda device: range(1, 5)  # ids of the streams that a side stream may be
    native.seed_delays(0)
    atexit.register(native.stop_streams)
    return native


@functools.cache
def register_process_group() -> None:
    """Make ``"simulated_ccl"`` a backend of torch.distributed, for tensors of the simulated accelerator."""
    native = load()

    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
        wire = dist.ProcessGroupGloo(dist.PrefixStore("simulated_ccl", store), rank, size, timeout)
        return native.make_group(wire, int(timeout.total_seconds() * 1000))

    dist.Backend.register_backend("simulated_ccl", create, devices=["simulated"])
    atexit.register(native.abort_groups)


def _device_module(native: Any) -> types.ModuleType:
    """Make the module that torch looks for under ``torch.simulated``."""
    module = types.ModuleType("torch.simulated")
    members = {
        "is_available": native.available,
        "is_initialized": lambda: True,
        "device_count": native.device_count,
        "current_device": native.current_device,
        "_is_in_bad_fork": native.in_forked_child,
        "synchronize": native.synchronize,
    }
    for name, member in members.items():
        setattr(module, name, member)
    return module
