"""The loaders that are compared: whose they are, what they need, and what they give on the CPU.

Where ``WEIGHTLOAD_PEERS`` names a folder, each of its subfolders has one package (``pip install --target``), which only
the loaders that ask for it get to see: two versions of safetensors can be compared, and none is installed for good.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from loaders import into_loads
from loaders import peer_loads as loads
from loaders.into_loads import IntoLoad
from loaders.peer_loads import Load

FOLDERS = "WEIGHTLOAD_PEERS"
BASELINE = "safetensors"
OURS = "weightload"

# Kinds of memory that a load gives. It is compared only with its like.
MAPPED = "mapped"  # views of the page cache; done when every page has been touched
PRIVATE = "private"  # memory of their own
INTO = "into"  # parameters that were there before
DEVICE = "device"  # an accelerator's memory
BASELINES = {MAPPED: BASELINE, PRIVATE: "safetensors clone", INTO: "safetensors load_state_dict", DEVICE: BASELINE}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A loader and what it needs."""

    load: Load | None
    of: str  # whose it is: of the settings of one, the best counts
    package: str  # to install
    module: str  # to import
    kind: str | None  # what it gives on the CPU; None: it only works on CUDA devices
    on_accelerators: bool = True
    only_cuda: bool = False
    into: IntoLoad | None = None
    folder: str | None = None  # below FOLDERS
    only_folder: bool = False  # what the environment has is another version
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of its process's environment


def _safetensors(load: Load | None, kind: str, on_accelerators: bool = False, into: IntoLoad | None = None) -> Peer:
    return Peer(load, BASELINE, "safetensors", "safetensors", kind, on_accelerators, into=into)


def _candidate(load: Load, kind: str | None, only_cuda: bool = False) -> Peer:
    peer = Peer(load, "safetensors 0.9", "safetensors", "safetensors", kind, only_cuda, only_cuda)
    return dataclasses.replace(peer, folder="safetensors-rc", only_folder=True)


def _fastsafetensors(load: Load, kind: str | None = PRIVATE, buffered: bool = False) -> Peer:
    """It reads past the page cache unless it is told not to, which is better for cold files only."""
    variables = {"FASTSAFETENSORS_ODIRECT": "0"} if buffered else {}
    name = "fastsafetensors"
    return Peer(load, name, name, name, kind, only_cuda=kind is None, folder=name, variables=variables)


def _instanttensor(load: Load) -> Peer:
    name = "instanttensor"
    return Peer(load, name, name, name, None, only_cuda=True, folder=name)


def _runai(strategy: str | None = None) -> Peer:
    """It reads past the page cache where the file system lets it; the other ways are named by its variable."""
    variables = {"RUNAI_STREAMER_FS_STRATEGY": strategy} if strategy else {}
    package = "runai-model-streamer"
    name, module = "run:ai streamer", "runai_model_streamer"
    return Peer(loads.runai_streamer, name, package, module, PRIVATE, folder=package, variables=variables)


def _ours(load: Load | None, kind: str, on_accelerators: bool = False, into: IntoLoad | None = None) -> Peer:
    return Peer(load, OURS, "weightload", "weightload", kind, on_accelerators, into=into)


# The slow ones last: where the time for a round runs out, the others have been measured.
PEERS: dict[str, Peer] = {
    BASELINE: _safetensors(loads.safetensors, MAPPED, True),
    "weightload": _ours(loads.weightload, MAPPED, True),
    "weightload load_file": _ours(loads.weightload_load_file, MAPPED),
    "safetensors load_file": _safetensors(loads.safetensors_load_file, MAPPED, True),
    "safetensors 0.9": _candidate(loads.safetensors, MAPPED),
    "safetensors 0.9 load_file": _candidate(loads.safetensors_load_file, MAPPED),
    "weightload pread": _ours(loads.weightload_pread, PRIVATE),
    "weightload load_file pread": _ours(loads.weightload_load_file_pread, PRIVATE),
    "safetensors clone": _safetensors(loads.safetensors_clone, PRIVATE),
    "safetensors pread": _safetensors(loads.safetensors_pread, PRIVATE),
    "safetensors 0.9 load_file pread": _candidate(loads.safetensors_load_file_pread, PRIVATE),
    "safetensors 0.9 prefetch": _candidate(loads.safetensors_prefetch, None, only_cuda=True),
    "safetensors 0.9 prefetch at once": _candidate(loads.safetensors_prefetch_at_once, None, only_cuda=True),
    "fastsafetensors": _fastsafetensors(loads.fastsafetensors),
    "fastsafetensors buffered": _fastsafetensors(loads.fastsafetensors, buffered=True),
    "fastsafetensors buffered 256 MiB": _fastsafetensors(loads.fastsafetensors_large_buffers, buffered=True),
    "fastsafetensors parallel": _fastsafetensors(loads.fastsafetensors_parallel, buffered=True),
    "fastsafetensors gds": _fastsafetensors(loads.fastsafetensors_gds, kind=None),
    "instanttensor": _instanttensor(loads.instanttensor),
    "instanttensor buffered": _instanttensor(loads.instanttensor_buffered),
    "run:ai streamer": _runai(),
    "run:ai streamer buffered": _runai("sync_buffered"),
    "run:ai streamer io_uring buffered": _runai("io_uring_buffered"),
    "fastvideo style": dataclasses.replace(_safetensors(loads.fastvideo_style, MAPPED, True), of="fastvideo style"),
    "safetensors load_state_dict": _safetensors(None, INTO, into=into_loads.safetensors_load_state_dict),
    "weightload load_state_dict": _ours(None, INTO, into=into_loads.weightload_load_state_dict),
    "weightload load_into": _ours(None, INTO, into=into_loads.weightload_load_into),
}
SWEEP = {f"weightload {n} threads": _ours(loads.weightload_threads(n), MAPPED, True) for n in (8, 12, 15)}


def kind_of(peer: Peer, device: torch.device) -> str | None:
    """The peer's result there, or None where it cannot run."""
    if device.type != "cpu":
        return DEVICE if peer.on_accelerators and (device.type == "cuda" or not peer.only_cuda) else None
    return peer.kind


def default_names(device: torch.device) -> list[str]:
    """All loaders for a device, and on the CPU those that need CUDA, which then say so."""
    # On the CPU `.to` does nothing.
    return [
        name
        for name, peer in PEERS.items()
        if (peer.on_accelerators if device.type != "cpu" else name != "fastvideo style")
    ]


def find(name: str) -> Peer:
    """A peer by name, or the function of a file of your own: ``path/to/file.py:function``.

    Such a function gives private memory, or what its attribute ``kind`` says.
    """
    if name in PEERS | SWEEP:
        return (PEERS | SWEEP)[name]
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_loader", path)
    if not path.endswith(".py") or spec is None or spec.loader is None:
        raise SystemExit(f"no such loader: {name!r}; there are {', '.join(PEERS | SWEEP)}, and FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load = getattr(module, function)
    return Peer(load, function, "", "torch", getattr(load, "kind", PRIVATE))


def _folder(peer: Peer) -> Path | None:
    """Where its package is, if it has a place of its own."""
    folders = os.environ.get(FOLDERS)
    folder = Path(folders, peer.folder).absolute() if folders and peer.folder else None
    return folder if folder and folder.is_dir() else None


def environment(*peers: Peer) -> dict[str, str]:
    """The environment of a process that runs these peers."""
    found = dict(os.environ)
    for peer in peers:
        found |= peer.variables
    folders = dict.fromkeys(str(folder) for folder in map(_folder, peers) if folder)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (*folders, found.get("PYTHONPATH"))))
    return found


def missing(peer: Peer, device: torch.device) -> str | None:
    """Why the peer cannot be tried here, as far as one can tell without starting it."""
    if kind_of(peer, device) is None:
        return "only for CUDA devices" if peer.only_cuda else f"not for {device.type}"
    folder = _folder(peer)
    if peer.only_folder and not folder:
        return f"it is not installed in {peer.folder} of the folder that {FOLDERS} names"
    if not folder and importlib.util.find_spec(peer.module) is None:
        return f"{peer.package} is not installed"
    return None
