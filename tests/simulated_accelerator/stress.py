"""Loads under thousands of seeds: delays, sizes of everything, threads, ways of reading and kinds of consumers.

    python tests/simulated_accelerator/stress.py [--first SEED] [--seeds N]

On CUDA's torch and the simulated CUDA with WEIGHTLOAD_TEST_ACCELERATOR=cuda, where a race stops it, too. Stops at the
first load that gives a wrong byte, and says its seed, which repeats the choices (not the scheduling).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import write_tensors
from support.simulated import DEVICE, KIND, current_stream, load, raw, reference_of
from support.simulated import native as start_native

import weightload
from weightload import settings

Tensors = dict[str, torch.Tensor]


def keep_all(paths: list[Path], _: random.Random) -> Tensors:
    return dict(load(*paths))


def use_and_drop(paths: list[Path], _: random.Random) -> Tensors:
    return {name: tensor.clone() for name, tensor in load(*paths)}


def own_stream(paths: list[Path], _: random.Random) -> Tensors:
    with current_stream(torch.Stream(device=DEVICE)):
        copies = {name: tensor.clone() for name, tensor in load(*paths)}
        return {name: tensor.cpu() for name, tensor in copies.items()}


def changing_streams(paths: list[Path], choose: random.Random) -> Tensors:
    weights, copies = load(*paths), {}
    streams = [torch.Stream(device=DEVICE) for _ in range(3)]
    for _ in range(len(weights)):
        with current_stream(choose.choice(streams)):
            name, tensor = next(weights)
            copies[name] = tensor.clone()
            del tensor
    torch.accelerator.synchronize()
    return copies


def two_at_once(paths: list[Path], _: random.Random) -> Tensors:
    first, second = load(*paths), load(*paths)
    got: list[Tensors] = [{}, {}]
    for (name, tensor), (other_name, other) in zip(first, second, strict=True):
        got[0][name], got[1][other_name] = tensor, other
    return {name: tensor if number % 2 else got[1][name] for number, (name, tensor) in enumerate(got[0].items())}


def after_leaving_early(paths: list[Path], choose: random.Random) -> Tensors:
    weights = load(*paths)
    for _ in range(choose.randrange(len(weights))):
        next(weights)
    weights.close()
    return dict(load(*paths))


def into_parameters(paths: list[Path], choose: random.Random) -> Tensors:
    target: Tensors = {}
    for name, tensor in reference_of(*paths).items():
        # Some of another dtype, which is cast on the device.
        other = tensor.is_floating_point() and tensor.dtype != torch.float64 and choose.random() < 0.2
        target[name] = torch.empty_like(tensor, dtype=torch.float64 if other else None).to(DEVICE)
    weightload.load_into(target, paths)
    return target


CONSUMERS: tuple[Callable[[list[Path], random.Random], Tensors], ...] = (
    keep_all,
    use_and_drop,
    own_stream,
    changing_streams,
    two_at_once,
    after_leaving_early,
    into_parameters,
)


def choose_settings(choose: random.Random) -> dict[str, Any]:
    slot = 4096 << choose.randrange(7)
    return {
        "slot_bytes": slot,
        "pinned_bytes": slot * choose.randint(1, 9),
        "device_block_bytes": choose.choice([4096, 50_000, 300_000, 1 << 21]),
        "threads": choose.randint(1, 6),
        "read": choose.choice(settings.READ_MODES),
    }


def run(seed: int, native: Any, files: list[Path], reference: Tensors) -> None:
    """One seed's load; raises AssertionError for a wrong byte."""
    choose = random.Random(seed)
    native.seed_delays(seed, choose.choice([0, 50, 500, 3000]))
    consumer = choose.choice(CONSUMERS)
    paths = choose.sample(files, choose.randint(1, len(files)))
    chosen = choose_settings(choose)
    what = f"seed {seed}: {consumer.__name__}, {chosen}"
    with settings.override(**chosen):
        got = consumer(paths, choose)
    assert set(got) == set(reference_of(*paths)), what
    for name, tensor in got.items():
        want = reference[name]
        same = torch.equal(raw(tensor), raw(want.to(tensor.dtype)))
        assert same, f"{what}: {name}"
    if KIND == "cuda":
        from simulated_cuda.native import take_reports

        races = take_reports()
        assert races == [], f"{what}: {races}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=2000)
    options = parser.parse_args()
    native = start_native()
    with tempfile.TemporaryDirectory() as folder:
        small = [(f"small.{i}", "F32", [i % 7, 11]) for i in range(120)]
        odd = [(f"odd.{i}", "U8", [i * i * 37 % 4001]) for i in range(60)]
        large = [("large.0", "BF16", [333, 331]), ("large.1", "F64", [3]), ("large.2", "F16", [100_001])]
        files = [
            write_tensors(Path(folder) / f"{number}.safetensors", tensors, pad_to=1, seed=number)
            for number, tensors in enumerate((small, odd, large))
        ]
        reference = reference_of(*files)
        begin = time.monotonic()
        for number, seed in enumerate(range(options.first, options.first + options.seeds), 1):
            run(seed, native, files, reference)
            if number % 100 == 0 or number == options.seeds:
                native.empty_cache()
                print(f"{number} of {options.seeds} seeds, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
