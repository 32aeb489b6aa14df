"""Fresh memory of a load is in the kind of pages that is cheaper here and now; tests decide what a page costs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import evict
from safetensors.torch import save_file

pytestmark = pytest.mark.alone

MIB = 1 << 20

START = """
    import sys
    import torch, weightload
    from weightload import _C, settings


    def huge_bytes():
        for line in open("/proc/self/smaps_rollup"):
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) << 10
"""

ITERATE = """
    kind, read, path = sys.argv[1:]


    _C.set_page_costs(*{"huge": (200, 1000), "single": (5000, 1000)}[kind])
    before = huge_bytes()
    with settings.override(read=read):
        weights = weightload.safetensors_weights_iterator([path], to_cpu=True, backend="pread", show_progress=False)
        tensors = dict(weights)
    grown = huge_bytes() - before
    expected = {name: tensor for name, tensor in weightload.load_file(path).items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    print(grown, weights.stats().direct_bytes)
"""


INTO = """
    kind, path = sys.argv[1:]


    _C.set_page_costs(*{"huge": (200, 1000), "single": (5000, 1000)}[kind])
    with weightload.safe_open(path, "pt") as file:
        targets = {name: torch.empty(file.get_slice(name).get_shape(), dtype=torch.uint8) for name in file.keys()}
    before = huge_bytes()
    weightload.load_into(targets, [path])
    grown = huge_bytes() - before
    assert all(torch.equal(targets[name], tensor) for name, tensor in weightload.load_file(path).items())
    print(grown)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fresh") / "model.safetensors"
    bits = torch.Generator().manual_seed(14)
    sizes = [3 * MIB + 1, 40 * MIB, 5, 70 * MIB, 17 * MIB - 3]
    save_file(
        {str(i): torch.randint(0, 256, (n,), dtype=torch.uint8, generator=bits) for i, n in enumerate(sizes)}, path
    )
    return path


def huge_pages_are_to_be_had() -> bool:
    return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()


@pytest.mark.parametrize("read", ["auto", "buffered", "direct"])
@pytest.mark.parametrize("kind", ["huge", "single"])
def test_the_cheaper_pages_are_taken(checkpoint: Path, kind: str, read: str) -> None:
    evict([checkpoint])
    command = [sys.executable, "-c", textwrap.dedent(START + ITERATE), kind, read, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    huge, direct = map(int, done.stdout.split())
    if kind == "single":
        # The first few, which are tried, and buffers for direct reads, a task of 8 MiB for each of a few threads.
        assert huge <= 60 * MIB
    elif huge_pages_are_to_be_had():
        assert huge > 100 * MIB
    assert read != "direct" or direct > 100 * MIB


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("kind", ["huge", "single"])
def test_targets_that_nobody_has_touched_are_in_the_cheaper_pages(checkpoint: Path, kind: str, cold: bool) -> None:
    if cold:
        evict([checkpoint])
    command = [sys.executable, "-c", textwrap.dedent(START + INTO), kind, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    huge = int(done.stdout)
    if kind == "single":  # those that are tried, and buffers for direct reads
        assert huge <= 60 * MIB
    elif huge_pages_are_to_be_had():
        assert huge > 80 * MIB
