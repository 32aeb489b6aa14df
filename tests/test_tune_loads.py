"""What a load of tune's is made of: whole tensors of a checkpoint, every page of them touched."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from weightload.page_touch import touch
from weightload.tune_loads import Checkpoint, Sample


def test_touching_brings_in_every_page(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    size = 50 * mmap.PAGESIZE
    path.write_bytes(bytes(size))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        tensor = torch.frombuffer(mapped, dtype=torch.float16).reshape(50, -1)
        touch(tensor)
        lines = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1].splitlines()
        assert next(line.split()[1] for line in lines if line.startswith("Rss:")) == str(size // 1024)
        del tensor
    for tensor in (torch.zeros(()), torch.zeros(0), torch.zeros(3, 0, 2), torch.zeros(5, dtype=torch.bool)):
        touch(tensor)


def test_the_sample_is_whole_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint((("a", "1", 100), ("a", "2", 5000), ("b", "3", 300), ("b", "4", 0)), 5400)
    assert checkpoint.sample(500) == Sample(("a", "b"), frozenset({"1", "3", "4"}), 400)
    assert checkpoint.sample(5400).bytes == 5400
    assert checkpoint.sample(10) == Sample(("a",), frozenset({"1"}), 100)
