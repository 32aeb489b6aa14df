"""The report of load_into."""

from __future__ import annotations

import dataclasses

from weightload._base.load_stats import LoadStats


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The tensors that were loaded, and where the time went."""

    loaded: list[str]
    """Names of the file's tensors that are in the target now, in the order of the files; with ``rename=`` the target's
    names, each once."""

    missing: list[str]
    """Names of the target, as its ``state_dict`` has them, that no file has. Tied names are there if one of them is.
    With ``rename=`` also those of which the files have a part only, which is loaded."""

    unexpected: list[str]
    """Names of the files that the target lacks."""

    bytes: int
    """Bytes of the loaded tensors in the files."""

    in_place: int
    """How many tensors of the files were read straight into their memory, without a second copy."""

    seconds: dict[str, float]
    """By stage: ``open`` (headers), ``match`` (names, shapes, planning), ``load``, and their sum ``total``. On an
    accelerator the host is done before the device is: work queued on the current stream comes after the load's."""

    stats: dict[str, LoadStats]
    """By device (``"cpu"``, ``"cuda:0"``): what the load there did. ``"cuda:0, replicas"``: what ranks with the same
    shards shared there."""

    took_part: list[str] = dataclasses.field(default_factory=list)
    """Modules that take part in their own loading (hooks, methods of their own). They got their tensors, and those of
    all modules below them, as ``load_state_dict`` gives them, not in place. ``""`` is the target itself."""
