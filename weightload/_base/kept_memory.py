"""release_memory: gives memory that is kept for later loads back to the system."""

from __future__ import annotations

from weightload import _C


def release_memory() -> int:
    """Give the private memory that no tensor uses any more, and that is kept for later loads, back to the system now.

    For processes that unload a model and load none soon. Tensors, and loads that are under way, keep what they have;
    the next load into private memory takes fresh memory, as the first one did. Other libraries keep memory of their
    own: ``torch.cuda.empty_cache()`` and, for page-locked memory, torch's host allocator are not touched.

    May be called from any thread. A forked child has nothing to give.

    Returns:
        The bytes given back. The system may have taken some of their pages before.
    """
    return _C.release_memory()
