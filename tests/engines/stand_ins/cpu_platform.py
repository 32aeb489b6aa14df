"""A platform plugin of vLLM's (``vllm.platform_plugins``), for CUDA's wheel on a machine without a GPU.

One operator of the CPU's wheel, which binds memory to a node, does nothing.
"""

from __future__ import annotations

import torch

library = torch.library.Library("_C", "FRAGMENT")
library.define("init_cpu_memory_env(int[] nodes) -> ()")
library.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")


def name() -> str:
    """The platform's class."""
    return "vllm.platforms.cpu.CpuPlatform"
